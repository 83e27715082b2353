"""Tensors of one model: Hugging Face <-> Megatron-core, and full <-> tensor-parallel part.

Everything is said by the rows of a family. A parameter is fused from its Hugging Face tensors first and cut after: with
Megatron's order (per key/value group [q..., k, v]; [gate; up] on each rank) one rule serves every row, also where there
are fewer groups than ranks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from ascendspeed.config import ModelConfig
from ascendspeed.errors import UserError
from ascendspeed.families import FAMILIES
from ascendspeed.families.family import Row, shape_of


def _qkv_join(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """q [heads * d, ...], k and v [groups * d, ...] -> [groups * (heads / groups + 2) * d, ...], per group [q..., k, v]."""
    groups = config.kv_heads
    return torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in tensors], 1).flatten(0, 1)


def _qkv_part(config: ModelConfig, fused: Tensor) -> list[Tensor]:
    groups, d = config.kv_heads, config.head_dim
    per_group = config.num_attention_heads // groups
    parts = fused.reshape(groups, -1, *fused.shape[1:]).split([per_group * d, d, d], 1)
    return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class Fusion:
    """`join` makes our tensor from theirs, `part` takes it apart again, bit for bit."""

    join: Callable[[ModelConfig, Sequence[Tensor]], Tensor]
    part: Callable[[ModelConfig, Tensor], list[Tensor]]
    stride: int = 1
    """Blocks along dimension 0 that tensor parallel cuts one by one."""


FUSIONS = {
    "one": Fusion(lambda config, tensors: tensors[0], lambda config, fused: [fused]),
    "qkv": Fusion(_qkv_join, _qkv_part),
    "glu": Fusion(lambda config, tensors: torch.cat(list(tensors)), lambda config, fused: list(fused.chunk(2)), stride=2),
}


@dataclass(frozen=True)
class Cut:
    """How tensor parallel cuts one full tensor into `parts`."""

    shape: tuple[int, ...]
    """Of the full tensor, without padding."""
    dim: int | None = None
    """Along which it is cut; None: every rank has the whole."""
    stride: int = 1
    """Blocks along `dim` that are cut one by one ([gate; up])."""
    parts: int = 1
    padded_rows: int = 0
    """Rows of the padded vocabulary; 0: not a vocabulary."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of one rank's part."""
        shape = list(self.shape)
        if self.padded_rows:
            shape[0] = self.padded_rows
        if self.dim is not None:
            shape[self.dim] //= self.parts
        return tuple(shape)

    def part(self, full: Tensor, rank: int) -> Tensor:
        """The part of rank `rank`, a view where it can be; rows of padding are zero."""
        if self.padded_rows:
            rows = self.padded_rows // self.parts
            mine = full[rank * rows : (rank + 1) * rows]
            return mine if len(mine) == rows else torch.cat([mine, full.new_zeros(rows - len(mine), *full.shape[1:])])
        if self.dim is None or self.parts == 1:
            return full
        blocks = full.chunk(self.stride, self.dim)
        pieces = [block.chunk(self.parts, self.dim)[rank] for block in blocks]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from the parts of all ranks, padding stripped."""
        if self.dim is None or self.parts == 1:
            full = parts[0]
        else:
            full = torch.cat([p.chunk(self.stride, self.dim)[i] for i in range(self.stride) for p in parts], self.dim)
        return full[: self.shape[0]] if self.padded_rows else full


@dataclass(frozen=True)
class Parameter:
    """One parameter of a concrete model: a row with its layer and its expert filled in."""

    name: str
    """Ours, with the layer's number in the whole model."""
    theirs: tuple[str, ...]
    row: Row
    shape: tuple[int, ...]
    """Of the full, unpadded tensor."""

    def cut(self, tensor_parallel: int, padded_vocab: int) -> Cut:
        """How `tensor_parallel` ranks share it; `padded_vocab` is the padded vocabulary of that layout."""
        dim = {"replicated": None, "rows": 0, "columns": 1, "vocab": 0}[self.row.split]
        if dim is None:
            return Cut(self.shape)
        rows = padded_vocab if self.row.split == "vocab" else 0
        return Cut(self.shape, dim, FUSIONS[self.row.fuse].stride, tensor_parallel, rows)


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of the model, in order, by the rows of its family."""
    for row in FAMILIES[config.family].rows_of(config):
        shape = shape_of(config, row)
        for layer in range(config.num_layers if "{l}" in row.ours else 1):
            for expert in range(config.num_experts or 0 if "{e}" in row.ours else 1):
                ours, *theirs = (name.format(l=layer, e=expert) for name in (row.ours, *row.theirs))
                yield Parameter(ours, tuple(theirs), row, shape)


def join(config: ModelConfig, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Our full tensor from the Hugging Face ones. Raises `UserError` when a shape is not the configuration's."""
    for name, shape in shapes_of(config, parameter).items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{name} is {list(tensors[name].shape)}, but config.json says {list(shape)}")
    return FUSIONS[parameter.row.fuse].join(config, [tensors[name] for name in parameter.theirs])


def part(config: ModelConfig, parameter: Parameter, full: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of our full one; the exact inverse of `join`."""
    return dict(zip(parameter.theirs, FUSIONS[parameter.row.fuse].part(config, full), strict=True))


def shapes_of(config: ModelConfig, parameter: Parameter) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors of one parameter."""
    parts = part(config, parameter, torch.empty(parameter.shape, device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in parts.items()}


def random_tensors(model: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Random weights that are the same for every layout: (name, full fp32 tensor), each from a generator of its own.

    Megatron's rule: normal(0, std), residual projections normal(0, std / sqrt(2 · layers)), biases 0, norms 1.
    """
    for parameter in parameters(model):
        if parameter.name.endswith(".bias"):
            yield parameter.name, torch.zeros(parameter.shape, device=device)
        elif len(parameter.shape) == 1:
            yield parameter.name, torch.ones(parameter.shape, device=device)
        else:
            generator = torch.Generator(device).manual_seed(crc32(f"{seed} {parameter.name}".encode()))
            residual = parameter.row.split == "columns"
            std = model.init_method_std / (math.sqrt(2 * model.num_layers) if residual else 1)
            yield parameter.name, torch.randn(parameter.shape, generator=generator, device=device).mul_(std)
