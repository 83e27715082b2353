"""Tensors of one model: where the pieces of a checkpoint lie in ours.

Everything is said by rows, and computed as rectangles (`Tile`) that a stored tensor shares with the full one: the same table serves
reading, writing, every format and every layout. Our order is Megatron's: per key/value group [q..., k, v]; [gate; up] on each rank.
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
from ascendspeed.models.families.base import ParamMapping, Partition, param_shape
from ascendspeed.utils.errors import UserError

Span = tuple[int, int]
"""First row of the full tensor, and how many."""


class Slice2D(NamedTuple):
    """A rectangle that a part shares with the full tensor, both seen as matrices [first dimension, all others]."""

    row: int
    column: int
    local_row: int
    local_column: int
    rows: int
    columns: int


def block_spans(config: ModelConfig, row: ParamMapping) -> list[list[Span]]:
    """The blocks of a full parameter, each as the rows it has there: itself; q, k and v; gate and up."""
    rows = param_shape(config, row)[0]
    if row.fusion == "glu":
        return [[(0, rows // 2)], [(rows // 2, rows // 2)]]
    if row.fusion == "qkv":
        groups, d = config.kv_heads, config.head_dim
        q, group = config.num_attention_heads // groups * d, rows // groups
        return [[(i * group + at, n) for i in range(groups)] for at, n in ((0, q), (q, d), (q + d, d))]
    return [[(0, rows)]]


def shard_slices(
    held: Sequence[Sequence[Span]],
    columns: int,
    dim: int | None,
    parts: int = 1,
    part: int = 0,
    padded: int = 0,
) -> Iterator[Slice2D]:
    """The tiles of one of `parts` parts: each block is cut along `dim` (None: not), and what comes off lies one after the other.

    `padded`: rows of a padded vocabulary; the rows of padding are in no tile.
    """
    left, width = (part * (columns // parts), columns // parts) if dim == 1 else (0, columns)
    at = 0
    for block in held:
        length = padded or sum(n for _, n in block)
        first, last = (part * (length // parts), (part + 1) * (length // parts)) if dim == 0 else (0, length)
        seen = 0
        for row, n in block:
            top, bottom = max(first, seen), min(last, seen + n)
            if top < bottom:
                yield Slice2D(row + top - seen, left, at + top - first, 0, bottom - top, width)
            seen += n
        at += last - first


SHARD_DIM: dict[Partition, int | None] = {"replicated": None, "rows": 0, "columns": 1, "vocab": 0}
"""Along which a row's `split` cuts."""


@dataclass(frozen=True)
class ShardSpec:
    """How tensor parallel cuts one full tensor into `parts`."""

    shape: tuple[int, ...]
    """Of the full tensor, without padding."""
    dim: int | None = None
    """Along which it is cut; None: every rank has the whole."""
    stride: int = 1
    """Blocks along `dim` that are cut one by one ([gate; up])."""
    num_shards: int = 1
    padded_rows: int = 0
    """Rows of the padded vocabulary; 0: not a vocabulary."""

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Of one rank's part."""
        shape = list(self.shape)
        if self.padded_rows:
            shape[0] = self.padded_rows
        if self.dim is not None:
            shape[self.dim] //= self.num_shards
        return tuple(shape)

    def slices(self, rank: int) -> Iterator[Slice2D]:
        """What the part of a rank shares with the full tensor."""
        rows = (self.shape or (1,))[0]
        held = [[(i * (rows // self.stride), rows // self.stride)] for i in range(self.stride)]
        return shard_slices(
            held, math.prod(self.shape[1:]), self.dim, self.num_shards, rank, self.padded_rows
        )

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """The part of rank `rank`, a view where it can be; rows of padding are zero."""
        if self.padded_rows:
            rows = self.padded_rows // self.num_shards
            mine = full[rank * rows : (rank + 1) * rows]
            return (
                mine
                if len(mine) == rows
                else torch.cat([mine, full.new_zeros(rows - len(mine), *full.shape[1:])])
            )
        if self.dim is None or self.num_shards == 1:
            return full
        blocks = full.chunk(self.stride, self.dim)
        pieces = [block.chunk(self.num_shards, self.dim)[rank] for block in blocks]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a concrete model: a row with its layer and its expert filled in."""

    name: str
    """Ours, with the layer's number in the whole model."""
    hf_names: tuple[str, ...]
    mapping: ParamMapping
    shape: tuple[int, ...]
    """Of the full, unpadded tensor."""
    layer: int | None = None
    expert: int | None = None

    def shard_spec(self, tensor_parallel: int, padded_vocab: int) -> ShardSpec:
        """How `tensor_parallel` ranks share it; `padded_vocab` is the padded vocabulary of that layout."""
        dim = SHARD_DIM[self.mapping.partition]
        if dim is None:
            return ShardSpec(self.shape)
        rows = padded_vocab if self.mapping.partition == "vocab" else 0
        return ShardSpec(self.shape, dim, 2 if self.mapping.fusion == "glu" else 1, tensor_parallel, rows)


def parameters(config: ModelConfig, rows: Iterable[ParamMapping] | None = None) -> Iterator[Parameter]:
    """Every parameter of the model, in order, by the rows of its family, or by others that name the same parameters."""
    for row in FAMILIES[config.family].mappings_of(config, rows):
        shape = param_shape(config, row)
        for layer in range(config.num_layers) if "{l}" in row.megatron_param else [None]:
            for expert in range(config.num_experts or 0) if "{e}" in row.megatron_param else [None]:
                ours, *theirs = (
                    name.format(l=layer, e=expert) for name in (row.megatron_param, *row.hf_params)
                )
                yield Parameter(ours, tuple(theirs), row, shape, layer, expert)


class StoredTensor(NamedTuple):
    """One tensor of a file and what it holds of one of our parameters; rows that no tile names are padding."""

    name: str
    parameter: Parameter
    shape: tuple[int, ...]
    slices: tuple[Slice2D, ...]


def stored_tensors(
    config: ModelConfig, parameter: Parameter, tp: int = 1, rank: int = 0, padded_vocab: int = 0
) -> list[StoredTensor]:
    """The tensors that hold a parameter in the file of one of `tp` ranks, by the names of its row."""
    row, found = parameter.mapping, block_spans(config, parameter.mapping)
    held = [found] if len(parameter.hf_names) == 1 else [[block] for block in found]
    dim, columns = SHARD_DIM[row.partition], math.prod(parameter.shape[1:])
    padded = padded_vocab if row.partition == "vocab" else 0
    entries = []
    for name, mine in zip(parameter.hf_names, held, strict=True):
        tiles = tuple(shard_slices(mine, columns, dim, tp, rank, padded))
        rows = sum((padded or sum(n for _, n in block)) // (tp if dim == 0 else 1) for block in mine)
        width = (columns // tp if dim == 1 else columns,) * (len(parameter.shape) - 1)
        entries.append(StoredTensor(name, parameter, (rows, *width), tiles))
    return entries


def hf_to_megatron(config: ModelConfig, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Our full tensor from the Hugging Face ones. Raises `UserError` when a shape is not the configuration's."""
    entries = stored_tensors(config, parameter)
    for entry in entries:
        if tuple(tensors[entry.name].shape) != entry.shape:
            raise UserError(
                f"{entry.name} is {list(tensors[entry.name].shape)}, but config.json says {list(entry.shape)}"
            )
    pieces = [(as_matrix(tensors[entry.name]), entry.slices) for entry in entries]
    rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
    return assemble(pieces, Slice2D(0, 0, 0, 0, rows, columns)).reshape(parameter.shape)


def megatron_to_hf(config: ModelConfig, parameter: Parameter, full: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of our full one; the exact inverse of `join`."""
    made = {}
    for entry in stored_tensors(config, parameter):
        pieces = [as_matrix(full)[tile.row : tile.row + tile.rows] for tile in entry.slices]
        made[entry.name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(entry.shape)
    return made


def shapes_of(config: ModelConfig, parameter: Parameter) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors of one parameter."""
    return {entry.name: entry.shape for entry in stored_tensors(config, parameter)}


def as_matrix(tensor: Tensor) -> Tensor:
    """[first dimension, all others]."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() != 2 else tensor


def assemble(pieces: Iterable[tuple[Tensor, Iterable[Slice2D]]], wanted: Slice2D) -> Tensor:
    """A rectangle of the full tensor (`row`, `column`, `rows`, `columns` of `wanted`) from matrices that hold tiles of it.

    A view where one of them holds it all. Raises ValueError when something of it is nowhere.
    """
    out, missing = None, wanted.rows * wanted.columns
    for matrix, tiles in pieces:
        for tile in tiles:
            top, bottom = max(tile.row, wanted.row), min(tile.row + tile.rows, wanted.row + wanted.rows)
            left, right = (
                max(tile.column, wanted.column),
                min(tile.column + tile.columns, wanted.column + wanted.columns),
            )
            if top >= bottom or left >= right:
                continue
            y, x = top - tile.row + tile.local_row, left - tile.column + tile.local_column
            found = matrix[y : y + bottom - top, x : x + right - left]
            if (bottom - top, right - left) == (wanted.rows, wanted.columns):
                return found
            if out is None:
                out = found.new_empty(wanted.rows, wanted.columns)
            out[top - wanted.row : bottom - wanted.row, left - wanted.column : right - wanted.column] = found
            missing -= found.numel()
    if missing:
        raise ValueError(f"{missing} elements of {wanted} are in no tile")
    return out


def random_tensors(
    model: ModelConfig, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Random weights that are the same for every layout: (name, full fp32 tensor), see `random_tensor`."""
    return (
        (parameter.name, random_tensor(model, parameter, seed, device)) for parameter in parameters(model)
    )


def random_tensor(
    model: ModelConfig, parameter: Parameter, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Fp32, from a generator of its own.

    Megatron's rule: normal(0, std), residual projections normal(0, std / sqrt(2 · layers)), biases 0, norms 1 (or 0, where that is
    added to 1).
    """
    if parameter.name.endswith(".bias"):
        return torch.zeros(parameter.shape, device=device)
    if len(parameter.shape) == 1:
        return torch.full(parameter.shape, 0.0 if model.zero_centered_norm else 1.0, device=device)
    generator = torch.Generator(device).manual_seed(crc32(f"{seed} {parameter.name}".encode()))
    std = model.init_method_std / (
        math.sqrt(2 * model.num_layers) if parameter.mapping.partition == "columns" else 1
    )
    return torch.randn(parameter.shape, generator=generator, device=device).mul_(std)
