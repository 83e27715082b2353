"""Checks of --save and --load before a run: all ranks see the same files and can write checkpoints."""

import logging
import shutil
from pathlib import Path
from tempfile import NamedTemporaryFile

from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.checkpoint.save import DISK_MARGIN
from ascendspeed.config.schema import Run
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models import estimates
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


def check_folders(run: Run, grid: ProcessGrid) -> None:
    """Runs all checks. Raises the same `UserError` on every rank; collective."""
    check_same_view(run, grid)
    if not run.train.save:
        return
    _check_space(run, grid)
    check_writable(Path(run.train.save), grid)
    _check_unused(run)


def check_same_view(run: Run, grid: ProcessGrid) -> None:
    """Raises `UserError` unless all ranks see the same checkpoints; with --auto-resume, --load too could
    differ.
    """
    load, save = run.train.load, run.train.save
    holds = {
        flag: bool(path) and looks_like_checkpoint(path) for flag, path in (("load", load), ("save", save))
    }
    views = grid.all_gather_object((load, run.train.finetune, holds))
    other = next((rank for rank, view in enumerate(views) if view != views[0]), None)
    if other is None:
        return
    seen = "; ".join(
        f"rank {rank}: --load {views[rank][0]}, checkpoints in {_flags_with_checkpoints(views[rank][2])}"
        for rank in (0, other)
    )
    raise UserError(
        f"the ranks do not see the same files there: {seen}; --save and --load must be on storage that all "
        "nodes share"
    )


def _flags_with_checkpoints(holds: dict[str, bool]) -> str:
    return " and ".join(f"--{flag}" for flag, present in holds.items() if present) or "neither"


def _check_space(run: Run, grid: ProcessGrid) -> None:
    """Raises `UserError` if --save has no space for one checkpoint; logs a note if it has none for all that
    will be kept.
    """
    train = run.train
    size = estimates.checkpoint_bytes(run.model, run.lora)
    folder = Path(train.save).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    # Rank 0's answer for all ranks: other programs write to the disk too.
    free = grid.all_gather_object(shutil.disk_usage(existing).free)[0]
    figures = (
        f"a checkpoint takes {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free in {train.save}"
    )
    if size + DISK_MARGIN > free:
        margin = f"of which {DISK_MARGIN / 2**20:.0f} MiB must stay free"
        raise UserError(f"{figures}, {margin}; free some space or choose another --save")
    count = _checkpoints_at_a_time(run)
    if count * size + DISK_MARGIN > free:
        logger.info(
            f"note: {figures}, which is not enough for the {count} that the run keeps at a time; "
            "see --keep and --save-interval"
        )


def _checkpoints_at_a_time(run: Run) -> int:
    """Checkpoints in --save at the moment when there are most of them."""
    train = run.train
    last = train.exit_interval or train.train_iters
    interval = train.save_interval or last
    saved = last // interval + bool(last % interval)
    return min(saved, (train.keep or saved) + 1)  # an old one is deleted after the new one is complete


def check_writable(folder: Path, grid: ProcessGrid) -> None:
    """Raises `UserError` unless every rank can create a file in the folder and sees the file of rank 0."""
    file, problem = None, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = NamedTemporaryFile(dir=folder, prefix=".try_", buffering=0)  # noqa: SIM115 - other ranks look
        file.write(b"x")
    except OSError as error:
        problem = f"{error.strerror}; choose another --save"
    first = grid.all_gather_object(file and Path(file.name).name)[0]
    if not problem and first and not (folder / first).exists():
        problem = "it does not see a file that rank 0 made; use storage that all nodes share"
    problems = grid.all_gather_object(problem)
    if file:
        file.close()
    for rank, text in enumerate(problems):
        if text:
            raise UserError(f"--save {folder}: rank {rank} cannot save there: {text}")


def _check_unused(run: Run) -> None:
    """Raises `UserError` if --save holds checkpoints of a run that this one does not continue."""
    load, save = run.train.load, run.train.save
    if not looks_like_checkpoint(save):
        return
    if run.train.finetune:
        raise UserError(
            f"--save {save} already holds the checkpoints of a run: continue that run with --auto-resume, "
            "or choose another folder for a new one"
        )
    if not is_same_folder(load, save):
        raise UserError(
            f"--save {save} already holds checkpoints: continue them with --load {save}, or choose another "
            "folder"
        )


def is_same_folder(load: str | None, save: str | None) -> bool:
    """True if --load and --save name one folder."""
    return bool(load and save) and Path(load).resolve() == Path(save).resolve()


def is_unused(folder: Path) -> bool:
    """True if a folder holds nothing but remains of a killed save, or is the root of an empty file system."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        path.name.startswith(".") or path.name == "lost+found" for path in folder.iterdir()
    )
