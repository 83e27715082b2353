"""Megatron rank files: one per tensor- and pipeline-parallel rank, in Megatron's own layout or in that of the DeepSpeed recipe.

The keys in a file are the names of `GPTModel.named_parameters()` on that rank: layers count from 0 on every pipeline stage.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed import weights
from ascendspeed.config import (
    ModelConfig,
    ParallelConfig,
    check_pipeline_parallel,
    check_tensor_parallel,
    padded_vocab_size,
)
from ascendspeed.errors import UserError
from ascendspeed.formats import sidecars
from ascendspeed.formats.files import PieceFile, Specs, create_pt, load_pt, nbytes
from ascendspeed.formats.progress import Report
from ascendspeed.formats.source import Source, Stream, check_names, check_tensor, one_dtype, parameters_by_name, read_config, some

RELEASE = "release"  # the name of an iteration that was converted, not trained


@dataclass(frozen=True)
class Layout:
    """One way of naming rank files and of wrapping what they hold."""

    kind: str
    tracker: str
    """File that names the folder of the iteration."""
    files: tuple[str, str]
    """Of rank `t` and stage `p`, under that folder: without and with pipeline stages."""
    pattern: str
    """Regular expression of both: tensor-parallel rank, then (optional) stage."""
    key: str
    """Where the tensors are in a file."""
    around: Mapping[str, Any]
    """What else is in a file."""

    def path(self, tp_rank: int, pp_rank: int, pp: int) -> str:
        """Of one rank's file, under the folder of the iteration."""
        return self.files[pp > 1].format(t=tp_rank, p=pp_rank)


DEEPSPEED = Layout(
    "DeepSpeed rank files",
    "latest",
    ("mp_rank_{t:02d}_model_states.pt",) * 2,
    r"mp_rank_(\d\d+)_model_states\.pt",
    "module",
    {"checkpoint_version": 3.0, "dp_world_size": 0},
)
MEGATRON = Layout(
    "Megatron rank files",
    "latest_checkpointed_iteration.txt",
    ("mp_rank_{t:02d}/model_optim_rng.pt", "mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt"),
    r"mp_rank_(\d\d+)(?:_(\d\d\d+))?/model_optim_rng\.pt",
    "model",
    {"checkpoint_version": 3.0, "iteration": 0},
)


def is_one(folder: Path) -> bool:
    """Whether a folder has the tracker of one of the layouts."""
    return _layout_of(folder) is not None


def _layout_of(folder: Path) -> Layout | None:
    return next((layout for layout in (MEGATRON, DEEPSPEED) if (folder / layout.tracker).is_file()), None)


def _iteration(folder: Path, layout: Layout) -> Path:
    try:
        name = (folder / layout.tracker).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / layout.tracker} cannot be read: {error}") from error
    if layout is MEGATRON and name.isdigit():
        name = f"iter_{int(name):07d}"
    if not name or Path(name).name != name:
        raise UserError(f"{folder / layout.tracker} names no folder beside it: {name[:80]!r}")
    return folder / name


def open_folder(folder: Path) -> Source:
    """Raises `UserError` naming what is missing, left over, mis-shaped or damaged; no tensor has been read by then."""
    layout = _layout_of(folder)
    theirs, config = read_config(folder)
    iteration = _iteration(folder, layout)
    ranks = _read_ranks(iteration, layout)
    tp, pp = 1 + max(t for t, _ in ranks), 1 + max(p for _, p in ranks)
    missing = [layout.path(t, p, pp) for t in range(tp) for p in range(pp) if (t, p) not in ranks]
    if missing:
        raise UserError(f"{iteration} lacks {some(missing)}: it was written for TP {tp} x PP {pp}")
    check_tensor_parallel(config, tp)
    check_pipeline_parallel(config, pp)
    places = Places(config, tp, pp, _vocabulary_rows(iteration, config, ranks, tp))
    dtypes = {}
    for (t, p), held in ranks.items():
        where = iteration / layout.path(t, p, pp)
        check_names(where, (name for name, _ in places.of_stage(p)), held, (r".*\._extra_state",))
        for name, parameter in places.of_stage(p):
            check_tensor(where, name, held[name], places.cut(parameter).part_shape)
    for parameter in parameters_by_name(config).values():
        stage, name = places.find(parameter)
        dtypes[parameter.name] = one_dtype(iteration, {f"{name} of rank {t}": ranks[t, stage][name] for t in range(tp)})

    def stream() -> Stream:
        for parameter in weights.parameters(config):
            stage, name = places.find(parameter)
            yield parameter.name, places.cut(parameter).merge([ranks[t, stage][name] for t in range(tp)])

    return Source(f"{layout.kind} for TP {tp} x PP {pp}", folder, config, theirs, dtypes, stream, folder)


def _read_ranks(folder: Path, layout: Layout) -> dict[tuple[int, int], dict[str, Tensor]]:
    """(tensor-parallel rank, pipeline rank) -> what its file holds, memory-mapped."""
    ranks = {}
    for path in sorted([*folder.glob("mp_rank_*.pt"), *folder.glob("mp_rank_*/*.pt")]):
        match = re.fullmatch(layout.pattern, path.relative_to(folder).as_posix())
        if match:
            held = load_pt(path)
            held = held.get(layout.key) if isinstance(held, dict) else None
            if not isinstance(held, dict):
                raise UserError(f"{path} holds no table of tensors under {layout.key!r}")
            rank = (int(match[1]), int(match[2] or 0) if match.re.groups > 1 else 0)
            if rank in ranks:
                raise UserError(f"{folder} has two files for rank {rank[0]}, stage {rank[1]}")
            ranks[rank] = held
    if not ranks:
        raise UserError(f"{folder} has no rank files ({layout.path(0, 0, 1)} and so on)")
    return ranks


def _vocabulary_rows(folder: Path, config: ModelConfig, ranks: Mapping, tp: int) -> int:
    """Rows of the padded vocabulary that the files were written with."""
    embedding = ranks[0, 0].get("embedding.word_embeddings.weight")
    rows = len(embedding) * tp if isinstance(embedding, Tensor) and embedding.dim() else config.vocab_size
    if rows < config.vocab_size:
        raise UserError(
            f"{folder}: the embedding has {rows} rows, but config.json says {config.vocab_size}: is a rank's file missing?"
        )
    return rows


@dataclass(frozen=True)
class Places:
    """Where each parameter lies in a T x P layout."""

    config: ModelConfig
    tp: int
    pp: int
    padded_vocab: int

    def cut(self, parameter: weights.Parameter) -> weights.Cut:
        """How the tensor-parallel ranks share it."""
        return parameter.cut(self.tp, self.padded_vocab)

    def find(self, parameter: weights.Parameter) -> tuple[int, str]:
        """Pipeline stage, and name there."""
        match = re.match(r"decoder\.layers\.(\d+)\.", parameter.name)
        if match:
            per_stage = self.config.num_layers // self.pp
            stage, layer = divmod(int(match[1]), per_stage)
            return stage, f"decoder.layers.{layer}.{parameter.name[match.end() :]}"
        return (0 if parameter.name.startswith("embedding.") else self.pp - 1), parameter.name

    def of_stage(self, stage: int) -> Iterator[tuple[str, weights.Parameter]]:
        """(name there, parameter) of everything that one pipeline stage has."""
        for parameter in weights.parameters(self.config):
            where, name = self.find(parameter)
            if where == stage:
                yield name, parameter


@dataclass(frozen=True)
class RankFiles:
    """How to write rank files."""

    tp: int = 1
    pp: int = 1
    deepspeed: bool = False
    """In the layout of the DeepSpeed recipe, which knows no pipeline stages."""
    make_vocab_size_divisible_by: int = 128

    def check(self, source: Source) -> None:
        """Raises `UserError` when the source cannot be written so."""
        if self.deepspeed and self.pp > 1:
            raise UserError(f"the DeepSpeed layout has no pipeline stages: leave --deepspeed out, or set them to 1 (not {self.pp})")
        if source.config.tie_embeddings and self.pp > 1:
            raise UserError("a model with tied embeddings has them on the first and the last stage: set pipeline stages to 1")
        if self.make_vocab_size_divisible_by < 1:
            raise UserError(f"the vocabulary cannot be made divisible by {self.make_vocab_size_divisible_by}")
        check_tensor_parallel(source.config, self.tp)
        check_pipeline_parallel(source.config, self.pp)

    def size(self, source: Source, dtype: torch.dtype | None) -> int:
        """Bytes that will be written."""
        stages = (self._specs(source, dtype, self._places(source), stage) for stage in range(self.pp))
        return self.tp * sum(nbytes(*spec) for specs in stages for spec in specs.values())

    def write(self, source: Source, folder: Path, dtype: torch.dtype | None, report: Report) -> None:
        """Writes everything into an empty folder, one tensor in memory at a time."""
        places, layout = self._places(source), DEEPSPEED if self.deepspeed else MEGATRON
        files: dict[tuple[int, int], PieceFile] = {}
        for p in range(self.pp):
            specs = self._specs(source, dtype, places, p)
            for t in range(self.tp):
                path = folder / RELEASE / layout.path(t, p, self.pp)
                path.parent.mkdir(parents=True, exist_ok=True)
                files[t, p] = create_pt(path, specs, lambda tensors: {**layout.around, layout.key: tensors})
        known = parameters_by_name(source.config)
        for ours, full in source.tensors():
            stage, name = places.find(known[ours])
            for t in range(self.tp):
                report(files[t, stage].write(name, places.cut(known[ours]).part(full, t)))
        for file in files.values():
            file.close()
        sidecars.write(source, folder, source.config, dtype)
        (folder / layout.tracker).write_text(RELEASE)

    def _places(self, source: Source) -> Places:
        parallel = ParallelConfig(self.tp, self.pp, make_vocab_size_divisible_by=self.make_vocab_size_divisible_by)
        return Places(source.config, self.tp, self.pp, padded_vocab_size(source.config, parallel))

    def _specs(self, source: Source, dtype: torch.dtype | None, places: Places, stage: int) -> Specs:
        return {
            name: (dtype or source.dtypes[parameter.name], places.cut(parameter).part_shape)
            for name, parameter in places.of_stage(stage)
        }
