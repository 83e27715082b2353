"""LoRA layers beside Megatron-core's frozen linears. Activations are [s, b, width] throughout.

The product z = x A^T of all adapters of a linear, [s, b, n x rank], is narrow, so tensor parallel
communicates z:
- Linear cut along rows (q, k, v; gate, up): A is replicated, B is cut as the weight is. In the backward pass
  the gradient of z is summed over the ranks, which completes the gradient of A. Under sequence parallel z is
  gathered, and the gradient of A is partial: it is summed afterwards.
- Linear cut along columns (o; down): A is cut, z is summed, B is replicated. Under sequence parallel z is
  scattered, and the gradient of B is partial.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig
from ascendspeed.distributed.device import current_device
from ascendspeed.models.gpt.linear import differentiable
from ascendspeed.models.lora.targets import LoraTarget, block_sizes, selected_targets
from ascendspeed.models.param_mapping import ShardSpec


def shard_specs(model: ModelConfig, parallel: ParallelConfig, lora: LoraConfig) -> dict[str, ShardSpec]:
    """Partition of every A and B of the model in this layout, by Megatron-core name; empty if LoRA is off."""
    tp = parallel.tensor_model_parallel_size
    return {
        target.megatron_name(which, layer): shard_spec(model, target, which, lora.lora_rank, tp)
        for layer in range(model.num_layers)
        for target in selected_targets(model, lora)
        for which in "AB"
    }


def shard_spec(model: ModelConfig, target: LoraTarget, which: str, rank: int, tp: int) -> ShardSpec:
    """Partition of A or B over `tp` ranks; `rank`: the LoRA rank."""
    shape = target.shape(which, rank)
    if target.mapping.partition == "columns":
        return ShardSpec(shape, 1, 1, tp) if which == "A" else ShardSpec(shape)
    if which == "A" or _needs_full_b(model, target, tp):
        return ShardSpec(shape)
    return ShardSpec(shape, 0, 1, tp)


def _needs_full_b(model: ModelConfig, target: LoraTarget, tp: int) -> bool:
    """True if a rank's rows of q, k and v are not an equal part of each: every rank then holds all of B and
    selects its rows."""
    mapping = target.mapping
    return tp > 1 and mapping.fusion == "qkv" and (len(mapping.hf_params) == 1 or model.kv_heads % tp > 0)


def attach(gpt: GPTModel, model: ModelConfig, lora: LoraConfig) -> None:
    """Freezes the model, all but the head of a reward model, and adds adapters, filled with zeros, to its
    linears."""
    gpt.requires_grad_(False)
    if model.reward_head and gpt.post_process:
        gpt.output_layer.requires_grad_(True)
    for layer in gpt.decoder.layers:
        for linear, targets in groupby(selected_targets(model, lora), lambda target: target.linear):
            parent = layer.self_attention if linear in ("linear_qkv", "linear_proj") else layer.mlp
            module = getattr(parent, linear)
            module.lora = LinearAdapter(model, lora, list(targets), gpt.config)
            module.register_forward_hook(_add)
    if gpt.pre_process:
        gpt.embedding.register_forward_hook(_begin)


def _add(
    linear: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Forward hook of a linear: adds the adapters' output."""
    out, bias = output
    return (out + linear.lora(inputs[0]) if linear.lora.enabled else out), bias


@contextmanager
def without_adapters(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Context in which the adapters of a model add nothing."""
    adapters = [part for module in modules for part in module.modules() if isinstance(part, LinearAdapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def _begin(embedding: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
    """Forward hook of the embedding: recomputed layers silently give adapters no gradient unless their input
    requires one."""
    if torch.is_grad_enabled():
        output.requires_grad_()


class LinearAdapter(torch.nn.Module):
    """All adapters of one linear; `forward` gives what they add to its output."""

    def __init__(
        self, model: ModelConfig, lora: LoraConfig, targets: Sequence[LoraTarget], config: Any
    ) -> None:
        super().__init__()
        self.enabled = True
        self.targets = targets
        self.scale = lora.lora_alpha / lora.lora_rank
        self.dropout = lora.lora_dropout
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.sequence_parallel = config.sequence_parallel
        self.product = config.kernels.linear
        mapping = targets[0].mapping
        self.cut_along_columns = mapping.partition == "columns"
        self.needs_full_b = _needs_full_b(model, targets[0], self.group.size())
        num_shards = 1 if self.needs_full_b or self.cut_along_columns else self.group.size()
        self.widths = [size // num_shards for size in block_sizes(model, mapping)]
        """Width of each block of the linear in this rank's outputs."""
        self.groups = model.kv_heads // num_shards if mapping.fusion == "qkv" else 1
        """Groups in which the blocks are interleaved."""
        for target in targets:
            for which in "AB":
                self._register(model, lora, target, which, config.params_dtype)

    def _register(
        self, model: ModelConfig, lora: LoraConfig, target: LoraTarget, which: str, dtype: torch.dtype
    ) -> None:
        spec = shard_spec(model, target, which, lora.lora_rank, self.group.size())
        weight = torch.nn.Parameter(torch.zeros(spec.shard_shape, dtype=dtype, device=current_device()))
        if spec.dim is not None:
            set_tensor_model_parallel_attributes(weight, True, spec.dim, 1)
        # A replicated weight on the sequence-parallel side of the exchange of z sees a part of the sequence:
        # its gradient is partial.
        sees_part = which == ("B" if self.cut_along_columns else "A")
        weight.sequence_parallel = self.sequence_parallel and spec.dim is None and sees_part
        self.register_parameter(f"{target.leaf}_{which}", weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, in_features] -> [s, b, out_features], both the share of this rank."""
        # As matrices, so that each product is one call whatever the strides of x are.
        z = self._exchange(self._down(x.flatten(0, 1))) * self.scale
        parts = z.chunk(len(self.targets), -1)
        deltas = [self._multiply(part, b) for part, b in zip(parts, self._weights("B"), strict=True)]
        return self._fuse(deltas).unflatten(0, (-1, x.size(1)))

    def _weights(self, which: str) -> Iterator[Tensor]:
        for target in self.targets:
            weight = getattr(self, f"{target.leaf}_{which}")
            if which == "B" and self.needs_full_b:
                # Each rank uses some rows of B and has the gradient of these rows: the backward pass sums
                # over the ranks.
                weight = copy_to_tensor_model_parallel_region(weight, group=self.group)
            yield weight

    def _down(self, x: Tensor) -> Tensor:
        """x [s * b, in_features] -> z [s * b, n x rank]."""
        if not (self.dropout and self.training):
            return self._multiply(x, torch.cat(list(self._weights("A"))))
        with self._dropout_rng():
            return torch.cat([self._multiply(F.dropout(x, self.dropout), a) for a in self._weights("A")], -1)

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return differentiable(x, weight, self.product)

    def _dropout_rng(self) -> AbstractContextManager:
        """Random state for dropout: ranks whose x differ must draw different masks, others equal ones.

        Under sequence parallel Megatron-core's block has already forked the state.
        """
        differs = self.cut_along_columns and not self.sequence_parallel
        return get_cuda_rng_tracker().fork() if differs else nullcontext()

    def _exchange(self, z: Tensor) -> Tensor:
        if self.cut_along_columns:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(z, group=self.group)
            return reduce_from_tensor_model_parallel_region(z, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(z, group=self.group)
        return copy_to_tensor_model_parallel_region(z, group=self.group)

    def _fuse(self, deltas: list[Tensor]) -> Tensor:
        """Concatenates in the order of the linear's outputs: [q ..., k, v] per key/value group; [gate; up].
        No adapter adds 0."""
        if len(self.widths) == 1:
            return deltas[0]
        blocks = [block.unflatten(-1, (self.groups, -1)) for block in self._blocks(deltas)]
        fused = torch.cat(blocks, -1).flatten(-2)
        return fused.chunk(self.group.size(), -1)[self.group.rank()] if self.needs_full_b else fused

    def _blocks(self, deltas: list[Tensor]) -> Sequence[Tensor]:
        """One tensor for each block of the linear's outputs; zeros for a block without an adapter."""
        names = self.targets[0].mapping.hf_params
        if len(names) == 1:  # one matrix holds the blocks consecutively
            return deltas[0].split(self.widths, -1)
        by_name = {
            f"{target.hf_module}.weight": delta for target, delta in zip(self.targets, deltas, strict=True)
        }
        blocks = []
        for name, width in zip(names, self.widths, strict=True):
            zeros = deltas[0].new_zeros(1).expand(*deltas[0].shape[:-1], width)
            blocks.append(by_name.get(name, zeros))
        return blocks
