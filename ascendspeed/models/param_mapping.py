"""Tensor arithmetic between checkpoints and the Megatron-core model, for every file format and parallel
layout.

`ParamMapping` entries of a family name the tensors; this module computes, as rectangles (`Slice2D`), which
part of a full Megatron-core parameter each stored tensor holds. Row order of the full parameters is
Megatron's: [q ..., k, v] for every key/value group in `linear_qkv`, and [gate; up] in `linear_fc1` (on each
tensor-parallel rank).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import (
    ParamMapping,
    Partition,
    Span,
    block_spans,
    param_shape,
    span_rows,
)
from ascendspeed.utils.errors import UserError

SHARD_DIM: dict[Partition, int | None] = {"replicated": None, "rows": 0, "columns": 1, "vocab": 0}
"""Dimension along which tensor parallel cuts, for every `ParamMapping.partition`."""

RANDOM_CHUNK = 1 << 24
"""Random weights that are drawn at a time; torch draws them in groups of 16."""


class Slice2D(NamedTuple):
    """Rectangle of a full tensor that a stored tensor or shard holds, both viewed as matrices [first
    dimension, all others]."""

    row: int
    column: int
    local_row: int
    """First row in the stored tensor."""
    local_column: int
    """First column in the stored tensor."""
    rows: int
    columns: int

    def intersection(self, other: "Slice2D") -> "Slice2D | None":
        """Rectangle of the full tensor that both hold, with the local position of `self`; None if they are
        disjoint."""
        top, bottom = max(self.row, other.row), min(self.row + self.rows, other.row + other.rows)
        left, right = (
            max(self.column, other.column),
            min(self.column + self.columns, other.column + other.columns),
        )
        if top >= bottom or left >= right:
            return None
        local_row, local_column = self.local_row + top - self.row, self.local_column + left - self.column
        return Slice2D(top, left, local_row, local_column, bottom - top, right - left)

    def within_local_rows(self, first: int, last: int) -> "Slice2D | None":
        """Part in the local rows `first` to `last`, with local rows counted from `first`; None if there is
        none."""
        top, bottom = max(first, self.local_row), min(last, self.local_row + self.rows)
        if top >= bottom:
            return None
        return self._replace(row=self.row + top - self.local_row, local_row=top - first, rows=bottom - top)


def shard_slices(
    blocks: Sequence[Sequence[Span]],
    columns: int,
    dim: int | None,
    num_shards: int = 1,
    shard: int = 0,
    padded_rows: int = 0,
) -> Iterator[Slice2D]:
    """Slices of shard `shard`: each block is cut along `dim` (None: not cut), and the shard holds its parts
    consecutively.

    `padded_rows`: rows of a padded vocabulary; padding belongs to no slice.
    """
    left, width = (shard * (columns // num_shards), columns // num_shards) if dim == 1 else (0, columns)
    local_row = 0  # first row of the block in the shard
    for block in blocks:
        length = padded_rows or span_rows(block)
        size = length // num_shards if dim == 0 else length
        first, last = (shard * size, (shard + 1) * size) if dim == 0 else (0, length)
        offset = 0  # rows of the block before the span
        for row, count in block:
            top, bottom = max(first, offset), min(last, offset + count)
            if top < bottom:
                yield Slice2D(row + top - offset, left, local_row + top - first, 0, bottom - top, width)
            offset += count
        local_row += last - first


@dataclass(frozen=True)
class ShardSpec:
    """Tensor-parallel partition of one full tensor."""

    shape: tuple[int, ...]
    """Shape of the full tensor, without vocabulary padding."""
    dim: int | None = None
    """Dimension that is cut; None: every rank holds the full tensor."""
    stride: int = 1
    """Number of blocks along `dim` that are cut separately, 2 for [gate; up]."""
    num_shards: int = 1
    padded_rows: int = 0
    """Rows of the padded vocabulary; 0: not a vocabulary."""

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of the shard of one rank."""
        shape = list(self.shape)
        if self.padded_rows:
            shape[0] = self.padded_rows
        if self.dim is not None:
            shape[self.dim] //= self.num_shards
        return tuple(shape)

    def slices(self, rank: int) -> Iterator[Slice2D]:
        """Slices of the full tensor that the shard of a rank holds."""
        rows = (self.shape or (1,))[0] // self.stride
        blocks = [[(i * rows, rows)] for i in range(self.stride)]
        columns = math.prod(self.shape[1:])
        return shard_slices(blocks, columns, self.dim, self.num_shards, rank, self.padded_rows)

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """Shard of rank `rank`, a view of `full` where possible; rows of vocabulary padding are zero."""
        if self.padded_rows:
            rows = self.padded_rows // self.num_shards
            shard = full[rank * rows : (rank + 1) * rows]
            padding = rows - len(shard)
            return torch.cat([shard, full.new_zeros(padding, *full.shape[1:])]) if padding else shard
        if self.dim is None or self.num_shards == 1:
            return full
        blocks = full.chunk(self.stride, self.dim)
        shards = [block.chunk(self.num_shards, self.dim)[rank] for block in blocks]
        return shards[0] if len(shards) == 1 else torch.cat(shards, self.dim)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a concrete model: a `ParamMapping` with its layer and expert filled in."""

    name: str
    """Megatron-core name, with the layer's number in the whole model."""
    hf_names: tuple[str, ...]
    mapping: ParamMapping
    shape: tuple[int, ...]
    """Shape of the full tensor, without vocabulary padding."""
    layer: int | None = None
    expert: int | None = None

    @property
    def full_slice(self) -> Slice2D:
        """The whole parameter as a slice."""
        return Slice2D(0, 0, 0, 0, self.shape[0], math.prod(self.shape[1:]))

    def shard_spec(self, tensor_parallel: int, padded_vocab: int) -> ShardSpec:
        """Partition over `tensor_parallel` ranks; `padded_vocab`: rows of the padded vocabulary in that
        layout."""
        dim = SHARD_DIM[self.mapping.partition]
        if dim is None:
            return ShardSpec(self.shape)
        rows = padded_vocab if self.mapping.partition == "vocab" else 0
        return ShardSpec(self.shape, dim, 2 if self.mapping.fusion == "glu" else 1, tensor_parallel, rows)


def parameters(config: ModelConfig, mappings: Iterable[ParamMapping] | None = None) -> Iterator[Parameter]:
    """Yields every parameter of the model, in order, by its family's mappings or by others for the same
    parameters."""
    for mapping in FAMILIES[config.family].mappings_of(config, mappings):
        shape = param_shape(config, mapping)
        layers = range(config.num_layers) if "{l}" in mapping.megatron_param else [None]
        experts = range(config.num_experts or 0) if "{e}" in mapping.megatron_param else [None]
        for layer in layers:
            for expert in experts:
                name = mapping.megatron_param.format(l=layer, e=expert)
                hf_names = tuple(name.format(l=layer, e=expert) for name in mapping.hf_params)
                yield Parameter(name, hf_names, mapping, shape, layer, expert)


class StoredTensor(NamedTuple):
    """One tensor of a file and its slices of a Megatron-core parameter; rows outside all slices are
    padding."""

    name: str
    parameter: Parameter
    shape: tuple[int, ...]
    slices: tuple[Slice2D, ...]


def stored_tensor(
    name: str,
    parameter: Parameter,
    blocks: Sequence[Sequence[Span]],
    dim: int | None,
    num_shards: int = 1,
    shard: int = 0,
    padded_rows: int = 0,
) -> StoredTensor:
    """The tensor that holds shard `shard` of some blocks of a parameter, consecutively; see
    `shard_slices`."""
    columns = math.prod(parameter.shape[1:])
    rows = sum((padded_rows or span_rows(block)) // (num_shards if dim == 0 else 1) for block in blocks)
    width = (columns // num_shards if dim == 1 else columns,) * (len(parameter.shape) - 1)
    slices = shard_slices(blocks, columns, dim, num_shards, shard, padded_rows)
    return StoredTensor(name, parameter, (rows, *width), tuple(slices))


def stored_tensors(
    config: ModelConfig, parameter: Parameter, tp: int = 1, rank: int = 0, padded_vocab: int = 0
) -> list[StoredTensor]:
    """Tensors that hold a parameter in the file of rank `rank` of `tp`, by the names of its mapping."""
    mapping = parameter.mapping
    blocks = block_spans(config, mapping)
    blocks_of_tensors = [blocks] if len(parameter.hf_names) == 1 else [[block] for block in blocks]
    padded_rows = padded_vocab if mapping.partition == "vocab" else 0
    return [
        stored_tensor(name, parameter, group, SHARD_DIM[mapping.partition], tp, rank, padded_rows)
        for name, group in zip(parameter.hf_names, blocks_of_tensors, strict=True)
    ]


def hf_to_megatron(config: ModelConfig, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Builds the full Megatron-core tensor from the Hugging Face ones.

    Raises `UserError` if a tensor does not have the shape that config.json implies.
    """
    entries = stored_tensors(config, parameter)
    for entry in entries:
        shape = tuple(tensors[entry.name].shape)
        if shape != entry.shape:
            raise UserError(f"{entry.name} is {list(shape)}, but config.json says {list(entry.shape)}")
    matrices = [(as_matrix(tensors[entry.name]), entry.slices) for entry in entries]
    return assemble(matrices, parameter.full_slice).reshape(parameter.shape)


def megatron_to_hf(config: ModelConfig, parameter: Parameter, full: Tensor) -> dict[str, Tensor]:
    """Splits the full Megatron-core tensor into the Hugging Face ones; the exact inverse of
    `hf_to_megatron`."""
    tensors = {}
    for entry in stored_tensors(config, parameter):
        rows = [as_matrix(full)[part.row : part.row + part.rows] for part in entry.slices]
        tensors[entry.name] = (rows[0] if len(rows) == 1 else torch.cat(rows)).view(entry.shape)
    return tensors


def as_matrix(tensor: Tensor) -> Tensor:
    """Views a tensor as [first dimension, all others]."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() != 2 else tensor


def assemble(matrices: Iterable[tuple[Tensor, Iterable[Slice2D]]], region: Slice2D) -> Tensor:
    """Builds a rectangle [region.rows, region.columns] of the full tensor from matrices that hold slices of
    it.

    Returns a view where one matrix holds all of it. Raises ValueError if no slice covers some elements.
    """
    out = None
    missing = region.rows * region.columns
    for matrix, slices in matrices:
        for stored in slices:
            common = stored.intersection(region)
            if common is None:
                continue
            rows = slice(common.local_row, common.local_row + common.rows)
            columns = slice(common.local_column, common.local_column + common.columns)
            block = matrix[rows, columns]
            if (common.rows, common.columns) == (region.rows, region.columns):
                return block
            if out is None:
                out = block.new_empty(region.rows, region.columns)
            y, x = common.row - region.row, common.column - region.column
            out[y : y + common.rows, x : x + common.columns] = block
            missing -= block.numel()
    if missing:
        raise ValueError(f"{missing} elements of {region} are in no stored tensor")
    return out


def random_tensors(
    model: ModelConfig, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, full fp32 tensor) of random weights, equal for every layout; see `random_tensor`."""
    for parameter in parameters(model):
        yield parameter.name, random_tensor(model, parameter, seed, device)


def random_tensor(
    model: ModelConfig, parameter: Parameter, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Random fp32 weights of one parameter, from a CPU generator seeded by `seed` and its name, so
    that one seed is one model on every device.

    Megatron's rule: normal(0, std), residual projections normal(0, std / sqrt(2 · layers)), biases 0, norms 1
    (0 where the model multiplies by 1 + weight).
    """
    if parameter.name.endswith(".bias"):
        return torch.zeros(parameter.shape, device=device)
    if len(parameter.shape) == 1:
        return torch.full(parameter.shape, 0.0 if model.zero_centered_norm else 1.0, device=device)
    generator = torch.Generator("cpu").manual_seed(crc32(f"{seed} {parameter.name}".encode()))
    is_residual = parameter.mapping.partition == "columns"
    std = model.init_method_std / (math.sqrt(2 * model.num_layers) if is_residual else 1)
    return _normal(parameter.shape, generator, device).mul_(std)


def _normal(
    shape: Sequence[int], generator: torch.Generator, device: torch.device | str, chunk: int = RANDOM_CHUNK
) -> Tensor:
    """`torch.randn(shape)` of a CPU generator, bit for bit, on any device.

    `chunk`: numbers on the host at a time, a multiple of 16.
    """
    tensor = torch.empty(tuple(shape), device=device)
    flat = tensor.view(-1)
    # The last chunk takes up to 15 more: torch draws fewer than 16 numbers in another way.
    starts = range(0, max(1, len(flat) - 15), chunk)
    for start, end in zip(starts, [*starts[1:], len(flat)], strict=True):
        flat[start:end].copy_(torch.randn(end - start, generator=generator))
    return tensor
