"""Rank files: one file per tensor-parallel rank and pipeline stage, read and planned under any file and
parameter names.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.load_files import load_pt
from ascendspeed.conversion.rank_file_names import RankFileNames
from ascendspeed.models import param_mapping
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.models.param_mapping import Parameter, Slice2D, StoredTensor
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

RankTensors = Mapping[tuple[int, int], Mapping[str, Tensor]]
"""(tensor-parallel rank, pipeline stage) -> the tensors in its file."""
StoredMatrices = dict[str, list[tuple[Tensor, tuple[Slice2D, ...]]]]
"""Parameter name -> the matrices that store it, each with the rectangles of the parameter in it."""
GROUPED_QKV_VERSION = 2.0
"""Version of Megatron's checkpoints since which a fused query_key_value is [q..., k, v] head by head."""


@dataclass(frozen=True)
class NamingScheme:
    """Parameter names in rank files; layers count from 0 on every stage."""

    name: str
    rows: Callable[[ModelConfig], Iterable[ParamMapping]]
    """Mappings of a model, one for each of its parameters."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that carry no weights."""
    stored: Callable[[ModelConfig, Parameter, "RankLayout", int], Iterable[StoredTensor]] | None = None
    """Tensors of a rank that store a parameter; None: `param_mapping.stored_tensors`."""


@dataclass(frozen=True)
class RankLayout:
    """Distribution of a model over rank files."""

    tp: int
    layers: tuple[int, ...]
    """Number of layers on each pipeline stage."""
    padded_vocab: int
    """Rows of the embedding over all ranks, with padding."""

    @property
    def pp(self) -> int:
        """Number of pipeline stages."""
        return len(self.layers)

    def locate(self, parameter: Parameter) -> tuple[int, int]:
        """Pipeline stage of a parameter, and the number of its layer there (0 for a parameter outside the
        layers).
        """
        if parameter.layer is None:
            return (0 if parameter.name.startswith("embedding.") else self.pp - 1), 0
        first_layers = [0, *accumulate(self.layers)]
        stage = bisect_right(first_layers, parameter.layer) - 1
        return stage, parameter.layer - first_layers[stage]


def stored_tensors(
    config: ModelConfig, scheme: NamingScheme, layout: RankLayout, rank: int, stage: int
) -> Iterator[StoredTensor]:
    """Yields the tensors in the file of one rank and stage."""
    rows = list(scheme.rows(config))
    for parameter in param_mapping.parameters(config, rows):
        home_stage, layer = layout.locate(parameter)
        names = parameter.mapping.hf_params
        is_embedding = parameter.layer is None and home_stage == 0
        if config.tie_embeddings and is_embedding and stage == layout.pp - 1 > 0:
            # The last stage holds a copy of a tied embedding.
            names = next(row.hf_params for row in rows if row.megatron_param == "output_layer.weight")
        elif home_stage != stage:
            continue
        names = tuple(name.format(l=layer, e=parameter.expert) for name in names)
        local = replace(parameter, hf_names=names)
        if scheme.stored:
            yield from scheme.stored(config, local, layout, rank)
        else:
            yield from param_mapping.stored_tensors(config, local, layout.tp, rank, layout.padded_vocab)


# ---------------------------------------------------------------- files


def read(folder: Path, file_names: RankFileNames) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Reads every rank's tensors, memory-mapped. Raises `UserError` if a file is missing or damaged.

    The chunks of an interleaved pipeline become stages of their own: chunk `v` of stage `p` is number `v` x
    stages + `p`.
    """
    chunks_of: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
    for path in sorted(folder.rglob("*.pt")):
        match = re.fullmatch(file_names.pattern, path.relative_to(folder).as_posix())
        if match:
            rank = (int(match[1]), int(match[2] or 0) if match.re.groups > 1 else 0)
            if rank in chunks_of:
                raise UserError(f"{folder} has two files for rank {rank[0]}, stage {rank[1]}")
            chunks_of[rank] = [dict(_flatten(chunk)) for chunk in _chunks(path, file_names)]
            _check_data(path, chunks_of[rank])
    if not chunks_of:
        raise UserError(f"{folder} has no rank files ({file_names.path(0, 0, 1)} and so on)")
    tp, pp = _sizes(chunks_of)
    missing = [file_names.path(t, p, pp) for t in range(tp) for p in range(pp) if (t, p) not in chunks_of]
    if missing:
        raise UserError(f"{folder} lacks {shorten_list(missing)}: it was written for TP {tp} x PP {pp}")
    if len({len(chunks) for chunks in chunks_of.values()}) > 1:
        raise UserError(f"{folder}: the ranks hold different numbers of chunks of an interleaved pipeline")
    return {(t, v * pp + p): chunk for (t, p), chunks in chunks_of.items() for v, chunk in enumerate(chunks)}


def _chunks(path: Path, file_names: RankFileNames) -> list[dict[str, Any]]:
    """Tables of tensors in a file: one, or one per chunk of an interleaved pipeline (`model0`, `model1`,
    ...).
    """
    content = load_pt(path)
    key = file_names.key
    tables = [content]
    if key and isinstance(content, dict):
        version = content.get("checkpoint_version", GROUPED_QKV_VERSION)
        if isinstance(version, (int, float)) and version < GROUPED_QKV_VERSION:
            raise UserError(
                f"{path} is of version {version} of Megatron's format, which orders query_key_value "
                f"differently"
            )
        numbered = takewhile(lambda name: name in content, (f"{key}{v}" for v in count()))
        tables = [content[name] for name in ([key] if key in content else numbered)]
    if not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path} holds no table of tensors{f' under {key!r}' if key else ''}")
    return tables


def _check_data(path: Path, chunks: Iterable[Mapping[str, Any]]) -> None:
    """Raises `UserError` for a tensor without values."""
    for chunk in chunks:
        for name, value in chunk.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise UserError(f"{path}: {name} has no values (device meta): it was not saved completely")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flattens nested tables; their keys are joined by dots."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _sizes(ranks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    return 1 + max(t for t, _ in ranks), 1 + max(p for _, p in ranks)


# ---------------------------------------------------------------- detection


def detect_naming(
    path: Path, schemes: Sequence[NamingScheme], config: ModelConfig, tensors: RankTensors
) -> NamingScheme:
    """Returns the naming scheme that knows most names of the first rank's tensors. Raises `UserError` if none
    knows any.
    """
    first_rank = tensors[0, 0]

    def known_names(scheme: NamingScheme) -> int:
        names = {name.format(l=0, e=0) for row in scheme.rows(config) for name in row.hf_params}
        return len(names & first_rank.keys())

    best = max(schemes, key=known_names)
    if known_names(best):
        return best
    if not first_rank:
        raise UserError(f"{path} holds no tensors")
    raise UserError(f"{path} holds tensors of unknown names: {shorten_list(sorted(first_rank))}")


def check_layers(path: Path, scheme: NamingScheme, config: ModelConfig, tensors: RankTensors) -> None:
    """Raises `UserError` if the files hold another number of layers than the configuration."""
    template = next(name for row in scheme.rows(config) for name in row.hf_params if "{l}" in name)
    pattern = re.compile(re.escape(template).replace(re.escape("{l}"), r"\d+").replace(re.escape("{e}"), "0"))
    layers = [
        sum(bool(pattern.fullmatch(name)) for name in names) for (t, _), names in tensors.items() if t == 0
    ]
    if sum(layers) != config.num_layers:
        stages = f" on {len(layers)} pipeline stages" if len(layers) > 1 else ""
        raise UserError(
            f"{path} holds {sum(layers)} layers{stages}, config.json says {config.num_layers}: another "
            f"model's, or is a file missing?"
        )


def layout_of(path: Path, file_names: RankFileNames, tensors: RankTensors, config: ModelConfig) -> RankLayout:
    """Derives the layout of Megatron's rank files: stages of equal length, vocabulary rows from the
    embedding.
    """
    tp, pp = _sizes(tensors)
    embedding = next(
        (t for name, t in tensors[0, 0].items() if "embedding" in name and isinstance(t, Tensor) and t.dim()),
        None,
    )
    rows = config.vocab_size if embedding is None else len(embedding) * tp
    if rows < config.vocab_size:
        raise UserError(
            f"{path}: the embedding has {rows} rows, but config.json says {config.vocab_size}: is a rank's "
            f"file missing?"
        )
    return RankLayout(tp, (config.num_layers // pp,) * pp, rows)
