"""Transformer layers that torch compiles, each as a single graph.

What would divide the graph happens outside: tables of the rotary embedding are made before the layers, and
attention of packed sequences, whose lengths differ in every batch, is an operation that torch does not look
into.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ascendspeed.distributed import sdpa_backend
from ascendspeed.distributed.layer_compiler import LayerCompiler
from ascendspeed.models.gpt.attention import attend_packed
from ascendspeed.models.gpt.packed_sequences import PackedSequences, packed_sequences_of

Gradients = tuple[Tensor, Tensor, Tensor]


def compile_layers(gpt: Any, compiler: LayerCompiler) -> None:
    """Lets torch compile the layers of a model, which has its adapters."""
    assert gpt.config.tensor_model_parallel_size == 1  # `linear._traced_linear` does not communicate
    attention = packed_attention(gpt.config.kernels.sdpa_backend)
    for layer in gpt.decoder.layers:
        layer.self_attention.core_attention.packed_attention = attention
        compiler.compile(layer)
    gpt.decoder.register_forward_pre_hook(_prepare, with_kwargs=True)


def _prepare(decoder: Any, inputs: tuple[Tensor | None, ...], settings: dict[str, Any]) -> None:
    """Hook before the layers: makes the tables of the rotary embedding."""
    hidden = inputs[0] if inputs else settings.get("hidden_states")
    hidden = decoder.input_tensor if hidden is None else hidden  # of a later pipeline stage
    config, packed = decoder.config, settings.get("packed_seq_params")
    share = decoder.layers[0].self_attention.core_attention.share
    if packed is None:
        config.rope.tables(hidden.size(0) * share.size, config.params_dtype, hidden.device, share)
    else:
        packed.cos_sin(config.rope, config.params_dtype, hidden.device, share)


@functools.cache
def packed_attention(backend: str | None = None) -> Any:
    """Registers attention within packed sequences as an operation of torch.

    Its arguments: query [s, b, heads, d], key and value [s, b, groups, d], position ids [b, s] on the CPU,
    scale. `backend`: that of torch's attention. The backward pass computes the attention again.
    """
    name = f"ascendspeed::packed_attention_{backend or 'default'}"

    def attend(packed: PackedSequences, scale: float | None, *qkv: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in qkv)
        with sdpa_backend.context(backend):
            return attend_packed(packed, q, k, v, scale=scale).permute(2, 0, 1, 3).contiguous()

    def forward(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float | None) -> Tensor:
        return attend(_packed_of(positions), scale, query, key, value)

    def backward(
        gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float | None
    ) -> Gradients:
        function = functools.partial(attend, _packed_of(positions), scale)
        _, differentiate = torch.func.vjp(function, query, key, value)
        first, second, third = (x.contiguous() for x in differentiate(gradient))
        return first, second, third

    operation = torch.library.custom_op(name, forward, mutates_args=())
    gradients = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())
    operation.register_fake(lambda query, *_: query.new_empty(query.shape))
    gradients.register_fake(lambda gradient, *qkv: tuple(x.new_empty(x.shape) for x in qkv[:3]))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.scale = inputs[4]

    def differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(gradient, *ctx.saved_tensors, ctx.scale), None, None

    operation.register_autograd(differentiate, setup_context=keep)
    return operation


@dataclass(frozen=True)
class _Positions:
    """Position ids as a key: equal for the same memory, which stays in use while the key lives."""

    tensor: Tensor = field(compare=False)
    address: int
    shape: torch.Size


def _packed_of(positions: Tensor) -> PackedSequences:
    """Sequences of position ids; those of the last batch are cached, for all layers."""
    return _cached_packed(_Positions(positions, positions.data_ptr(), positions.shape))


@functools.lru_cache(1)
def _cached_packed(positions: _Positions) -> PackedSequences:
    packed = packed_sequences_of(positions.tensor)
    assert packed is not None
    return packed
