"""LoRA: adapters beside megatron-core's linears, whose weights stay as they are. [s, b, width] all along.

What goes through all A of a linear, z [s, b, n x rank], is narrow, so z is what tensor parallel sends:
- rows of the weight cut (q, k, v; gate, up): A is whole on every rank, B is cut as the weight is. Backwards, z's gradient is summed
  over the ranks, which makes that of A whole; under sequence parallel z is gathered, and A's gradient is a part, to be summed;
- columns cut (o; down): A is cut, z is summed, B is whole; under sequence parallel z is scattered, and B's gradient is a part.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from ascendspeed.models.lora.targets import LoraTarget, blocks, selected_targets
from ascendspeed.models.param_mapping import ShardSpec


def shard_specs(model: ModelConfig, parallel: ParallelConfig, lora: LoraConfig) -> dict[str, ShardSpec]:
    """How every A and B of the model is cut in this layout; nothing when LoRA is off."""
    tp = parallel.tensor_model_parallel_size
    return {
        target.megatron_name(which, layer): shard_spec(model, target, which, lora.lora_rank, tp)
        for layer in range(model.num_layers)
        for target in selected_targets(model, lora)
        for which in "AB"
    }


def shard_spec(model: ModelConfig, target: LoraTarget, which: str, rank: int, tp: int) -> ShardSpec:
    """How A or B is cut by `tp` ranks."""
    shape = target.shape(which, rank)
    if target.mapping.partition == "columns":
        return ShardSpec(shape, 1, 1, tp) if which == "A" else ShardSpec(shape)
    return ShardSpec(shape) if which == "A" or _crosses(model, target, tp) else ShardSpec(shape, 0, 1, tp)


def _crosses(model: ModelConfig, target: LoraTarget, tp: int) -> bool:
    """Whether a rank's rows of q, k and v are no even part of each: then every rank has all of B, and takes what is its own."""
    row = target.mapping
    return tp > 1 and row.fusion == "qkv" and (len(row.hf_params) == 1 or model.kv_heads % tp > 0)


def attach(gpt: GPTModel, model: ModelConfig, lora: LoraConfig) -> None:
    """Freezes the model and gives its linears adapters, not yet written."""
    gpt.requires_grad_(False)
    for layer in gpt.decoder.layers:
        for linear, targets in groupby(selected_targets(model, lora), lambda target: target.linear):
            where = layer.self_attention if linear in ("linear_qkv", "linear_proj") else layer.mlp
            module = getattr(where, linear)
            module.lora = LinearAdapter(model, lora, list(targets), gpt.config)
            module.register_forward_hook(_add)
    if gpt.pre_process:
        gpt.embedding.register_forward_hook(_begin)


def _add(
    linear: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    out, bias = output
    return out + linear.lora(inputs[0]), bias


def _begin(embedding: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
    """Recomputed layers give their adapters no gradient, without a word, unless what goes into them wants one too."""
    if torch.is_grad_enabled():
        output.requires_grad_()


class LinearAdapter(torch.nn.Module):
    """What the adapters of one linear add to its output."""

    def __init__(
        self, model: ModelConfig, lora: LoraConfig, targets: Sequence[LoraTarget], config: Any
    ) -> None:
        super().__init__()
        self.targets, self.scale, self.dropout = targets, lora.lora_alpha / lora.lora_rank, lora.lora_dropout
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.sequence, self.columns = config.sequence_parallel, targets[0].mapping.partition == "columns"
        self.crosses = _crosses(model, targets[0], self.group.size())
        row, parts = targets[0].mapping, 1 if self.crosses or self.columns else self.group.size()
        self.widths = [width // parts for width in blocks(model, row)]  # of the blocks in this rank's outputs
        self.heads = (
            model.kv_heads // parts if row.fusion == "qkv" else 1
        )  # groups that the blocks interleave in
        for target in targets:
            for which in "AB":
                how = shard_spec(model, target, which, lora.lora_rank, self.group.size())
                weight = torch.nn.Parameter(
                    torch.zeros(how.shard_shape, dtype=config.params_dtype, device=current_device())
                )
                if how.dim is not None:
                    set_tensor_model_parallel_attributes(weight, True, how.dim, 1)
                # Of a part of the sequence only: what is whole on every rank, and on this side of the exchange of z.
                weight.sequence_parallel = (
                    self.sequence and how.dim is None and which == ("B" if self.columns else "A")
                )
                self.register_parameter(f"{target.leaf}_{which}", weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [s, b, inputs] -> [s, b, outputs], both this rank's share."""
        # As matrices: one product each, whatever the strides of x are.
        z = self._exchange(self._down(x.flatten(0, 1))) * self.scale
        deltas = [
            F.linear(part, b)
            for part, b in zip(z.chunk(len(self.targets), -1), self._weights("B"), strict=True)
        ]
        return self._fuse(deltas).unflatten(0, (-1, x.size(1)))

    def _weights(self, which: str) -> Iterator[Tensor]:
        for target in self.targets:
            weight = getattr(self, f"{target.leaf}_{which}")
            # Each rank's gradient of a B of which it uses some rows is that of these rows: they are summed.
            yield (
                copy_to_tensor_model_parallel_region(weight, group=self.group)
                if which == "B" and self.crosses
                else weight
            )

    def _down(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return F.linear(x, torch.cat(list(self._weights("A"))))
        with self._masks():
            return torch.cat([F.linear(F.dropout(x, self.dropout), a) for a in self._weights("A")], -1)

    def _masks(self) -> AbstractContextManager:
        """Ranks whose x differ must draw differently, the others the same. Under sequence parallel the block has seen to it."""
        return get_cuda_rng_tracker().fork() if self.columns and not self.sequence else nullcontext()

    def _exchange(self, z: Tensor) -> Tensor:
        if self.columns:
            exchange = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence
                else reduce_from_tensor_model_parallel_region
            )
        else:
            exchange = (
                gather_from_sequence_parallel_region
                if self.sequence
                else copy_to_tensor_model_parallel_region
            )
        return exchange(z, group=self.group)

    def _fuse(self, deltas: list[Tensor]) -> Tensor:
        """In the order of the linear's outputs: per key/value group [q..., k, v]; [gate; up]. Matrices without an adapter add 0."""
        if len(self.widths) == 1:
            return deltas[0]
        fused = torch.cat(
            [block.unflatten(-1, (self.heads, -1)) for block in self._spread(deltas)], -1
        ).flatten(-2)
        return fused.chunk(self.group.size(), -1)[self.group.rank()] if self.crosses else fused

    def _spread(self, deltas: list[Tensor]) -> Sequence[Tensor]:
        """One tensor for each block of the linear's outputs."""
        names = self.targets[0].mapping.hf_params
        if len(names) == 1:  # a matrix that holds the blocks one after the other
            return deltas[0].split(self.widths, -1)
        made = {
            f"{target.hf_module}.weight": delta for target, delta in zip(self.targets, deltas, strict=True)
        }
        missing = (deltas[0].new_zeros(1).expand(*deltas[0].shape[:-1], width) for width in self.widths)
        return [made.get(name, zeros) for name, zeros in zip(names, missing, strict=True)]
