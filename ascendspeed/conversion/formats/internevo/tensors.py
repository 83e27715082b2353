"""What the tensors of an InternEvo training folder hold of ours, whatever its parallel mode and release."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.models.families.internevo_names import InternEvoStyle
from ascendspeed.models.param_mapping import SHARD_DIM, Parameter, Slice2D, Span, StoredTensor


def stored(style: InternEvoStyle, config: ModelConfig, parameter: Parameter, rank: int) -> list[StoredTensor]:
    """The tensors that hold a parameter in the files of one of `style.ranks` ranks, by the names in `theirs`; it may hold none."""
    row = parameter.mapping
    parts = style.outer if style.outer and parameter.layer is None else style.ranks
    dim, part = _dimension(row, style), rank % parts
    if rank and row.megatron_param.endswith("linear_proj.bias") and not style.isp:
        return []  # it is added to the sum over the ranks: only the first one has it
    held = _blocks(config, row, style)
    if not _as_one(row, style):
        groups = [held] if len(row.hf_params) == 1 else [[block] for block in held]
        return [
            _entry(name, parameter, group, dim, parts, part)
            for name, group in zip(parameter.hf_names, groups, strict=True)
        ]
    together = _entry("", parameter, [[span for block in held for span in block]], dim, parts, part)
    lengths = [_length(block) // parts for block in param_mapping.block_spans(config, row)]
    return list(_divide(together, parameter.hf_names, lengths if len(row.hf_params) > 1 else [sum(lengths)]))


def _dimension(row: ParamMapping, style: InternEvoStyle) -> int | None:
    if not style.isp or row.megatron_param.startswith("embedding."):
        return SHARD_DIM[row.partition]
    return None if "norm" in row.megatron_param else 0


def _as_one(row: ParamMapping, style: InternEvoStyle) -> bool:
    """Whether the blocks of a row were one tensor when the ranks' parts were cut off it."""
    if ".linear_qkv." in row.megatron_param:
        return style.cut_qkv or (style.isp and len(row.hf_params) == 1)
    return style.cut_glu and ".linear_fc1." in row.megatron_param


def _blocks(config: ModelConfig, row: ParamMapping, style: InternEvoStyle) -> list[list[Span]]:
    """Our rows in the order in which they lie there."""
    if ".linear_qkv." not in row.megatron_param:
        return param_mapping.block_spans(config, row)
    q, k, v = param_mapping.block_spans(config, replace(row, fusion="qkv"))
    heads = [
        [_pairs(span, config.head_dim) if style.qk_interleaved else [span] for span in block]
        for block in (q, k)
    ]
    heads.append([[span] for span in v])
    if row.fusion == "qkv" and not style.cut_qkv:
        return [[span for group in block for span in group] for block in heads]
    return [[span for group in zip(*heads, strict=True) for block in group for span in block]]


def _pairs(span: Span, d: int) -> list[Span]:
    first, n = span
    return [
        (head + i + half, 1)
        for head in range(first, first + n, d)
        for i in range(d // 2)
        for half in (0, d // 2)
    ]


def _length(block: Iterable[Span]) -> int:
    return sum(n for _, n in block)


def _entry(
    name: str, parameter: Parameter, held: Sequence[Sequence[Span]], dim: int | None, parts: int, part: int
) -> StoredTensor:
    columns = math.prod(parameter.shape[1:])
    rows = sum(_length(block) // (parts if dim == 0 else 1) for block in held)
    width = (columns // parts if dim == 1 else columns,) * (len(parameter.shape) - 1)
    return StoredTensor(
        name, parameter, (rows, *width), tuple(param_mapping.shard_slices(held, columns, dim, parts, part))
    )


def _divide(entry: StoredTensor, names: Sequence[str], lengths: Sequence[int]) -> Iterator[StoredTensor]:
    """The pieces of a tensor that was saved under several names, one after the other."""
    at = 0
    for name, length in zip(names, lengths, strict=True):
        tiles = tuple(_window(entry.slices, at, at + length))
        yield entry._replace(name=name, shape=(length, *entry.shape[1:]), slices=tiles)
        at += length


def _window(tiles: Iterable[Slice2D], first: int, last: int) -> Iterator[Slice2D]:
    """What lies in the rows from `first` to `last` of a tensor, counted from there."""
    for tile in tiles:
        top, bottom = max(first, tile.local_row), min(last, tile.local_row + tile.rows)
        if top < bottom:
            yield tile._replace(row=tile.row + top - tile.local_row, local_row=top - first, rows=bottom - top)
