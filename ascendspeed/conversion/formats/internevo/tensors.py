"""Maps parameters to the tensors of InternEvo's rank files, for every parallel mode and release."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families.base import ParamMapping, Span, block_spans, span_rows
from ascendspeed.models.families.internevo_names import InternEvoStyle
from ascendspeed.models.param_mapping import SHARD_DIM, Parameter, StoredTensor


def stored_tensors(
    style: InternEvoStyle, config: ModelConfig, parameter: Parameter, rank: int
) -> list[StoredTensor]:
    """The tensors that store a parameter in the file of one of `style.ranks` ranks, under the names in
    `hf_names`; may be empty.
    """
    row = parameter.mapping
    parts = style.outer if style.outer and parameter.layer is None else style.ranks
    part = rank % parts
    dim = _shard_dim(row, style)
    if rank and row.megatron_param.endswith("linear_proj.bias") and not style.isp:
        return []  # added to the sum over the ranks, so that only the first rank has it
    blocks = _stored_blocks(config, row, style)
    if not _sharded_as_one(row, style):
        groups = [blocks] if len(row.hf_params) == 1 else [[block] for block in blocks]
        return [
            param_mapping.stored_tensor(name, parameter, group, dim, parts, part)
            for name, group in zip(parameter.hf_names, groups, strict=True)
        ]
    spans = [span for block in blocks for span in block]
    fused = param_mapping.stored_tensor("", parameter, [spans], dim, parts, part)
    lengths = [span_rows(block) // parts for block in block_spans(config, row)]
    if len(row.hf_params) == 1:
        lengths = [sum(lengths)]
    return list(_split(fused, parameter.hf_names, lengths))


def _shard_dim(row: ParamMapping, style: InternEvoStyle) -> int | None:
    if not style.isp or row.megatron_param.startswith("embedding."):
        return SHARD_DIM[row.partition]
    return None if "norm" in row.megatron_param else 0


def _sharded_as_one(row: ParamMapping, style: InternEvoStyle) -> bool:
    """True if the blocks of a row (q, k, v; gate, up) were one tensor when it was sharded."""
    if ".linear_qkv." in row.megatron_param:
        return style.cut_qkv or (style.isp and len(row.hf_params) == 1)
    return style.cut_glu and ".linear_fc1." in row.megatron_param


def _stored_blocks(config: ModelConfig, row: ParamMapping, style: InternEvoStyle) -> list[list[Span]]:
    """Blocks of a parameter as row spans of the Megatron tensor, in InternEvo's order."""
    if ".linear_qkv." not in row.megatron_param:
        return block_spans(config, row)
    q, k, v = block_spans(config, replace(row, fusion="qkv"))
    by_head = [
        [_rotary_pairs(span, config.head_dim) if style.qk_interleaved else [span] for span in block]
        for block in (q, k)
    ]
    by_head.append([[span] for span in v])
    if row.fusion == "qkv" and not style.cut_qkv:
        return [[span for head in block for span in head] for block in by_head]
    grouped: list[Span] = []
    for group in zip(*by_head, strict=True):  # q..., k, v of one key/value group
        for head in group:
            grouped += head
    return [grouped]


def _rotary_pairs(span: Span, d: int) -> list[Span]:
    """Rows of heads of width `d` in rotated pairs: 0, d/2, 1, d/2 + 1, ..."""
    first, n = span
    return [
        (head + i + half, 1)
        for head in range(first, first + n, d)
        for i in range(d // 2)
        for half in (0, d // 2)
    ]


def _split(entry: StoredTensor, names: Sequence[str], lengths: Sequence[int]) -> Iterator[StoredTensor]:
    """Splits a tensor into consecutive parts that were saved under several names."""
    first = 0
    for name, length in zip(names, lengths, strict=True):
        within = (held.within_local_rows(first, first + length) for held in entry.slices)
        slices = tuple(held for held in within if held is not None)
        yield entry._replace(name=name, shape=(length, *entry.shape[1:]), slices=slices)
        first += length
