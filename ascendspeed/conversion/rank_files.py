"""Files of tensor- and pipeline-parallel ranks, whatever their names: how they are read, and what each of them holds."""

import hashlib
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.checkpoint_reader import (
    CheckpointReader,
    check_names,
    check_tensor,
    from_pieces,
    one_dtype,
    same_bits,
)
from ascendspeed.conversion.load_files import load_pt
from ascendspeed.models import param_mapping
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.models.param_mapping import Parameter, StoredTensor
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

logger = logging.getLogger(__name__)

PADDING = 128
"""Rows that a vocabulary is padded to a multiple of, times the tensor-parallel ranks, unless a user asked for another number."""
RankTensors = Mapping[tuple[int, int], Mapping[str, Tensor]]
"""(tensor-parallel rank, pipeline stage) -> what its file holds."""
OLDEST = 2.0
"""Version of Megatron's checkpoints since which a fused query_key_value is [q..., k, v] head by head."""


@dataclass(frozen=True)
class RankFileNames:
    """One way of naming rank files and of wrapping what they hold."""

    kind: str
    tracker: str
    """File that names the folder of the iteration."""
    files: tuple[str, str]
    """Of rank `t` and stage `p`, under that folder: without and with pipeline stages."""
    pattern: str
    """Regular expression of both: tensor-parallel rank, then (optional) stage."""
    key: str
    """Where the tensors are in a file; empty: at its top."""
    around: Mapping[str, Any]
    """What else is in a file."""

    def path(self, tp_rank: int, pp_rank: int, pp: int) -> str:
        """Of one rank's file, under the folder of the iteration."""
        return self.files[pp > 1].format(t=tp_rank, p=pp_rank)


@dataclass(frozen=True)
class NamingScheme:
    """The names that tensors have in rank files; layers count from 0 on every stage."""

    name: str
    rows: Callable[[ModelConfig], Iterable[ParamMapping]]
    """What they say for a model, one row for each of its parameters."""
    junk: tuple[str, ...] = ()
    """Regular expressions of what carries nothing."""
    holds: Callable[[ModelConfig, Parameter, "RankLayout", int], Iterable[StoredTensor]] | None = None
    """What a rank's tensors hold of a parameter, by the names in its `theirs`; None: what its row says (`weights.stored`)."""


@dataclass(frozen=True)
class RankLayout:
    """Over how many ranks a model lies."""

    tp: int
    layers: tuple[int, ...]
    """Of every pipeline stage."""
    padded_vocab: int

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.layers)

    def find(self, parameter: Parameter) -> tuple[int, int]:
        """Pipeline stage, and number of the parameter's layer there (0 for what is in no layer)."""
        if parameter.layer is None:
            return (0 if parameter.name.startswith("embedding.") else self.pp - 1), 0
        firsts = [0, *accumulate(self.layers)]
        stage = bisect_right(firsts, parameter.layer) - 1
        return stage, parameter.layer - firsts[stage]


def stored(
    config: ModelConfig, dialect: NamingScheme, grid: RankLayout, rank: int, stage: int
) -> Iterator[StoredTensor]:
    """What one rank's file holds."""
    rows = list(dialect.rows(config))
    for parameter in param_mapping.parameters(config, rows):
        where, layer = grid.find(parameter)
        names = parameter.mapping.hf_params
        if config.tie_embeddings and where == 0 and stage == grid.pp - 1 > 0 and parameter.layer is None:
            names = next(
                row.hf_params for row in rows if row.megatron_param == "output_layer.weight"
            )  # the last stage has a copy
        elif where != stage:
            continue
        local = replace(parameter, hf_names=tuple(name.format(l=layer, e=parameter.expert) for name in names))
        if dialect.holds:
            yield from dialect.holds(config, local, grid, rank)
        else:
            yield from param_mapping.stored_tensors(config, local, grid.tp, rank, grid.padded_vocab)


def read(folder: Path, layout: RankFileNames) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Every rank's tensors, memory-mapped. Raises `UserError` when a file is missing or is damaged.

    The chunks of an interleaved pipeline are stages of their own here: `v` of stage `p` is number `v` x stages + `p`.
    """
    found: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
    for path in sorted(folder.rglob("*.pt")):
        match = re.fullmatch(layout.pattern, path.relative_to(folder).as_posix())
        if match:
            rank = (int(match[1]), int(match[2] or 0) if match.re.groups > 1 else 0)
            if rank in found:
                raise UserError(f"{folder} has two files for rank {rank[0]}, stage {rank[1]}")
            found[rank] = [dict(_flat(chunk)) for chunk in _chunks(path, layout)]
    if not found:
        raise UserError(f"{folder} has no rank files ({layout.path(0, 0, 1)} and so on)")
    tp, pp = _size(found)
    missing = [layout.path(t, p, pp) for t in range(tp) for p in range(pp) if (t, p) not in found]
    if missing:
        raise UserError(f"{folder} lacks {shorten_list(missing)}: it was written for TP {tp} x PP {pp}")
    if len({len(chunks) for chunks in found.values()}) > 1:
        raise UserError(f"{folder}: the ranks hold different numbers of chunks of an interleaved pipeline")
    return {(t, v * pp + p): chunk for (t, p), chunks in found.items() for v, chunk in enumerate(chunks)}


def _chunks(path: Path, layout: RankFileNames) -> list[dict[str, Any]]:
    """The tables of tensors in a file: one, or as many as it has chunks of an interleaved pipeline (`model0`, `model1`, ...)."""
    held = load_pt(path)
    tables = [held]
    if layout.key and isinstance(held, dict):
        version = held.get("checkpoint_version", OLDEST)
        if isinstance(version, (int, float)) and version < OLDEST:
            raise UserError(
                f"{path} is of version {version} of Megatron's format, whose query_key_value lies otherwise"
            )
        chunks = takewhile(lambda key: key in held, (f"{layout.key}{v}" for v in count()))
        tables = [held[key] for key in ([layout.key] if layout.key in held else chunks)]
    if not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path} holds no table of tensors{f' under {layout.key!r}' if layout.key else ''}")
    return tables


def _flat(held: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tables within tables, their keys joined by dots."""
    for name, value in held.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _size(found: Iterable[tuple[int, int]]) -> tuple[int, int]:
    return 1 + max(t for t, _ in found), 1 + max(p for _, p in found)


def detect_naming(
    where: Path, dialects: Sequence[NamingScheme], config: ModelConfig, found: RankTensors
) -> NamingScheme:
    """The dialect that the names of the first rank's tensors are of. Raises `UserError` when it is none."""

    def known(dialect: NamingScheme) -> int:
        names = {name.format(l=0, e=0) for row in dialect.rows(config) for name in row.hf_params}
        return len(names & found[0, 0].keys())

    best = max(dialects, key=known)
    if not known(best):
        said = (
            f"tensors of names that are not known here: {shorten_list(sorted(found[0, 0]))}"
            if found[0, 0]
            else "no tensors"
        )
        raise UserError(f"{where} holds {said}")
    return best


def check_layers(where: Path, dialect: NamingScheme, config: ModelConfig, found: RankTensors) -> None:
    """Raises `UserError` when the names in the files speak of another number of layers than the configuration."""
    template = next(name for row in dialect.rows(config) for name in row.hf_params if "{l}" in name)
    pattern = re.compile(re.escape(template).replace(re.escape("{l}"), r"\d+").replace(re.escape("{e}"), "0"))
    stages = {
        p: sum(bool(pattern.fullmatch(name)) for name in tensors)
        for (t, p), tensors in found.items()
        if t == 0
    }
    if sum(stages.values()) != config.num_layers:
        said = (
            f"{sum(stages.values())} layers on {len(stages)} pipeline stages"
            if len(stages) > 1
            else f"{stages[0]} layers"
        )
        raise UserError(
            f"{where} holds {said}, config.json says {config.num_layers}: another model's, or is a file missing?"
        )


def grid_of(where: Path, layout: RankFileNames, found: RankTensors, config: ModelConfig) -> RankLayout:
    """The grid that the files were written for: equal stages, and as many rows of vocabulary as the embedding has."""
    tp, pp = _size(found)
    embedding = next(
        (t for name, t in found[0, 0].items() if "embedding" in name and isinstance(t, Tensor) and t.dim()),
        None,
    )
    rows = config.vocab_size if embedding is None else len(embedding) * tp
    if rows < config.vocab_size:
        said = f"the embedding has {rows} rows, but config.json says {config.vocab_size}: is a rank's file missing?"
        raise UserError(f"{where}: {said}")
    return RankLayout(tp, (config.num_layers // pp,) * pp, rows)


def source(
    kind: str,
    folder: Path,
    config: ModelConfig,
    theirs: dict[str, Any],
    found: RankTensors,
    dialect: NamingScheme,
    grid: RankLayout,
) -> CheckpointReader:
    """The source that reads rank files. Raises `UserError` naming what is missing, left over, mis-shaped or contradicts itself."""
    held: dict[str, list[tuple[str, Tensor]]] = {}
    pieces: dict[str, list] = {}
    firsts: dict[
        tuple, Tensor
    ] = {}  # the first tensor that holds some part; others that hold the same are copies
    for (t, p), tensors in found.items():
        entries = list(stored(config, dialect, grid, t, p))
        where = folder / f"(rank {t}, stage {p})" if len(found) > 1 else folder
        check_names(where, (entry.name for entry in entries), tensors, dialect.junk)
        for entry in entries:
            tensor, ours = tensors[entry.name], entry.parameter.name
            check_tensor(where, entry.name, tensor, entry.shape)
            held.setdefault(ours, []).append((f"{entry.name} of rank {t}, stage {p}", tensor))
            first = firsts.setdefault((ours, entry.slices), tensor)
            if first is tensor or not entry.slices:  # a rank may hold nothing but padding, which is no copy
                pieces.setdefault(ours, []).append((param_mapping.as_matrix(tensor), entry.slices))
            elif not same_bits(tensor, first):
                raise UserError(
                    f"{folder}: {entry.name} of rank {t}, stage {p} is not the copy of another's that it should be"
                )
    _check_no_twins(folder, config, dialect, grid, found)
    _check_padding(folder, config, grid, pieces)
    dtypes = {p.name: one_dtype(folder, dict(held[p.name])) for p in param_mapping.parameters(config)}
    return CheckpointReader(kind, folder, config, theirs, dtypes, from_pieces(pieces), folder)


def _check_no_twins(
    folder: Path, config: ModelConfig, dialect: NamingScheme, grid: RankLayout, found: RankTensors
) -> None:
    """Raises `UserError` when two files that should hold different weights hold the same: one was copied over the other."""
    seen: dict[bytes, tuple[tuple, str]] = {}
    for (t, p), tensors in found.items():
        entries = (
            e
            for e in stored(config, dialect, grid, t, p)
            if e.parameter.layer is not None and len(e.shape) == 2
        )
        entry = next((e for e in entries if e.parameter.mapping.partition != "replicated"), None)
        cut = tensors[entry.name] if entry else torch.zeros(1, 1)
        if entry is None or bool((cut[:64] == cut[0, 0]).all()):
            continue  # nothing to tell ranks apart by: a stage without layers, weights that were never set
        mark = hashlib.sha256(memoryview(cut[:64].contiguous().flatten().view(torch.uint8).numpy())).digest()
        part, other = seen.setdefault(mark, ((entry.parameter.name, entry.slices), f"rank {t}, stage {p}"))
        if part != (entry.parameter.name, entry.slices):
            raise UserError(
                f"{folder}: rank {t}, stage {p} holds the weights of {other}: was one file copied over the other?"
            )


def _check_padding(folder: Path, config: ModelConfig, grid: RankLayout, pieces: Mapping[str, list]) -> None:
    """Rows beyond the vocabulary that hold something are said, and are an error when they are more than padding would be.

    Zeros are ours; AscendSpeed's converter padded with copies of the last real rows.
    """
    for parameter in param_mapping.parameters(config):
        if (
            parameter.layer is not None
            or parameter.mapping.partition != "vocab"
            or grid.padded_vocab <= config.vocab_size
        ):
            continue
        parts = [matrix[sum(tile.rows for tile in tiles) :] for matrix, tiles in pieces[parameter.name]]
        count = sum(map(len, parts))
        if not any(bool(part.any()) for part in parts) or _are_the_last_rows(
            parts, count, parameter, pieces[parameter.name]
        ):
            continue
        if count >= PADDING * grid.tp:
            raise UserError(
                f"{folder}: {parameter.name} has {count} rows beyond the vocab_size = {config.vocab_size} of config.json, and they "
                "hold something that would be lost: correct vocab_size"
            )
        logger.info(
            f"note: {folder}: {count} rows of padding in {parameter.name} hold something; they are left out"
        )


def _are_the_last_rows(parts: list[Tensor], count: int, parameter: Parameter, pieces: list) -> bool:
    rows, columns = parameter.shape
    return count <= rows and same_bits(
        param_mapping.assemble(pieces, param_mapping.Slice2D(rows - count, 0, 0, 0, count, columns)),
        torch.cat(parts),
    )
