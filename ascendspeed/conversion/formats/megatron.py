"""Rank files of Megatron-core: in Megatron's own layout, and in that of the DeepSpeed recipe.

The names in a file are those of `GPTModel.named_parameters()` on that rank: layers count from 0 on every pipeline stage.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ascendspeed.config.schema import (
    ModelConfig,
    ParallelConfig,
    check_pipeline_parallel,
    check_tensor_parallel,
    padded_vocab_size,
)
from ascendspeed.conversion import hf_assets, legacy_names, rank_files, support_matrix
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, read_config
from ascendspeed.conversion.output_files import create_pt
from ascendspeed.conversion.rank_files import NamingScheme, RankFileNames, RankLayout
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import plain_file_name

logger = logging.getLogger(__name__)

RELEASE = "release"  # the name of an iteration that was converted, not trained
DEEPSPEED = RankFileNames(
    "DeepSpeed rank files",
    "latest",
    ("mp_rank_{t:02d}_model_states.pt",) * 2,
    r"mp_rank_(\d\d+)_model_states\.pt",
    "module",
    {"checkpoint_version": 3.0, "dp_world_size": 0},
)
MEGATRON = RankFileNames(
    "Megatron rank files",
    "latest_checkpointed_iteration.txt",
    ("mp_rank_{t:02d}/model_optim_rng.pt", "mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt"),
    r"mp_rank_(\d\d+)(?:_(\d\d\d+))?/model_(?:optim_)?rng\.pt",
    "model",
    {"checkpoint_version": 3.0, "iteration": 0},
)


def _our_names(config: ModelConfig) -> Iterator[ParamMapping]:
    for row in FAMILIES[config.family].param_mappings:
        yield replace(
            row, hf_params=(row.megatron_param,), fusion=row.fusion if row.fusion == "glu" else "one"
        )


MCORE = NamingScheme("Megatron-core", _our_names, junk=(r".*\._extra_state",))
DIALECTS = (MCORE, *legacy_names.OTHERS)
"""Names that rank files may have; the first is the one that is written."""


def is_one(folder: Path) -> bool:
    """Whether a folder has the tracker of one of the layouts, or the files of one iteration."""
    return _layout_of(folder) is not None


def open_folder(folder: Path, config: Path) -> CheckpointReader:
    """Raises `UserError` naming what is missing, left over, mis-shaped or damaged; no tensor has been read by then."""
    layout = _layout_of(folder)
    iteration = _iteration(folder, layout)
    if iteration == folder == config and not (config / "config.json").is_file():
        config = folder.parent  # the folder of one iteration was named
    theirs, config, beside = *read_config(config), config
    _check_sharded(iteration)
    held = rank_files.read(iteration, layout)
    dialect = rank_files.detect_naming(iteration, DIALECTS, config, held)
    rank_files.check_layers(iteration, dialect, config, held)
    grid = rank_files.grid_of(iteration, layout, held, config)
    check_tensor_parallel(config, grid.tp)
    check_pipeline_parallel(config, grid.pp)
    if dialect in legacy_names.OLD:
        support_matrix.check("ascendspeed", "reads", config.family)
    if doubt := legacy_names.doubt(dialect, config, grid.tp):
        logger.info(f"note: {folder}: {doubt}")
    kind = f"{layout.kind} for TP {grid.tp} x PP {grid.pp}" + (
        f", names of {dialect.name}" if dialect is not MCORE else ""
    )
    return replace(
        rank_files.source(kind, folder, config, theirs, held, dialect, grid),
        beside=beside,
        grid=(grid.tp, grid.pp),
    )


def _layout_of(folder: Path) -> RankFileNames | None:
    layouts = (MEGATRON, DEEPSPEED)
    marks = {(layout.tracker, *(layout.path(0, 0, pp) for pp in (1, 2))): layout for layout in layouts}
    return next(
        (layout for names, layout in marks.items() if any((folder / name).is_file() for name in names)), None
    )


def _check_sharded(iteration: Path) -> None:
    """Raises `UserError` for a checkpoint of Megatron-core's own sharded format: its index is a pickle."""
    if (iteration / ".metadata").exists() or any(iteration.glob("*.distcp")):
        raise UserError(
            f"{iteration} is in Megatron's torch_dist format, which is not read here: let Megatron-LM write rank files first "
            "(--ckpt-convert-format torch --ckpt-convert-save DIR)"
        )


def _iteration(folder: Path, layout: RankFileNames) -> Path:
    if not (folder / layout.tracker).exists():
        return folder
    try:
        name = (folder / layout.tracker).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / layout.tracker} cannot be read: {error}") from error
    if layout is MEGATRON and name.isascii() and name.isdigit():
        name = f"iter_{int(name):07d}"
    return folder / plain_file_name(name, folder / layout.tracker)


@dataclass(frozen=True)
class RankFileWriter:
    """How to write rank files."""

    tp: int = 1
    pp: int = 1
    deepspeed: bool = False
    """In the layout of the DeepSpeed recipe, which knows no pipeline stages."""
    make_vocab_size_divisible_by: int = 128

    def check(self, source: CheckpointReader) -> None:
        """Raises `UserError` when the source cannot be written so."""
        if self.deepspeed and self.pp > 1:
            raise UserError(
                f"the DeepSpeed layout has no pipeline stages: leave --deepspeed out, or set them to 1 (not {self.pp})"
            )
        if self.make_vocab_size_divisible_by < 1:
            raise UserError(f"the vocabulary cannot be made divisible by {self.make_vocab_size_divisible_by}")
        check_tensor_parallel(source.config, self.tp)
        check_pipeline_parallel(source.config, self.pp)

    def files(self, source: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """What will be written: a file for every rank."""
        layout, config = self._layout(), source.config
        parallel = ParallelConfig(
            self.tp, self.pp, make_vocab_size_divisible_by=self.make_vocab_size_divisible_by
        )
        grid = RankLayout(
            self.tp, (config.num_layers // self.pp,) * self.pp, padded_vocab_size(config, parallel)
        )
        create = partial(create_pt, around=lambda tensors: {**layout.around, layout.key: tensors})
        return [
            PlannedFile(
                f"{RELEASE}/{layout.path(t, p, self.pp)}",
                tuple(rank_files.stored(config, MCORE, grid, t, p)),
                create,
            )
            for t in range(self.tp)
            for p in range(self.pp)
        ]

    def finish(self, source: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes what stands beside the weights, and last the file that names their folder."""
        hf_assets.write(source, folder, source.config, dtype)
        (folder / self._layout().tracker).write_text(RELEASE)

    def _layout(self) -> RankFileNames:
        return DEEPSPEED if self.deepspeed else MEGATRON
