"""Finds the newest complete checkpoint. All ranks call these functions together and get the same result."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ascendspeed.checkpoint import manifest
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.paths import MANIFEST, STEP_PATTERN, describe_missing, read_latest, step_folders
from ascendspeed.utils.errors import UserError

if TYPE_CHECKING:
    from ascendspeed.distributed.process_groups import ProcessGrid

logger = logging.getLogger(__name__)

Gather = Callable[[list[str]], list[str]]
"""Takes this rank's texts and returns those of all ranks in rank order, on every rank."""


def _alone(texts: list[str]) -> list[str]:
    return texts


@dataclass(frozen=True)
class Readers:
    """The ranks that open a checkpoint together and divide its verification; by default one process."""

    rank: int = 0
    world: int = 1
    gather: Gather = _alone

    @classmethod
    def of(cls, grid: "ProcessGrid") -> "Readers":
        """All ranks of a grid."""
        return cls(grid.rank, grid.world, lambda texts: list(chain(*grid.all_gather_object(texts))))

    def open(self, path: str | Path) -> Checkpoint:
        """Calls `open_checkpoint` with these ranks."""
        return open_checkpoint(path, self.rank, self.world, self.gather)


def open_checkpoint(path: str | Path, rank: int = 0, world: int = 1, gather: Gather = _alone) -> Checkpoint:
    """Verifies and opens the checkpoint in a step's folder, or the newest good one in a folder of steps.

    Raises `UserError` if there is none, or if the named step is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(describe_missing(path))
    if not ((path / MANIFEST).exists() or STEP_PATTERN.fullmatch(path.name)):
        checkpoint = find_checkpoint(path, rank, world, gather)
        if checkpoint is None:
            raise UserError(f"{path}: holds no training checkpoint (no step_* folder)")
        return checkpoint
    checkpoint, problems = _verify_and_open(path, rank, world, gather)
    if checkpoint is None:
        _check_readable(path, problems)
        raise UserError(f"{path} is damaged: {'; '.join(problems)}")
    return checkpoint


def find_checkpoint(
    save_dir: str | Path, rank: int = 0, world: int = 1, gather: Gather = _alone
) -> Checkpoint | None:
    """Opens the checkpoint that `latest` names, or the next older good one with a warning that names the
    problem.

    Every rank logs the same lines. Returns None for a folder without checkpoints. Raises `UserError` if none
    of the checkpoints is complete, if one before the first complete one cannot be read (which may be the
    newest state of the run, and whole), or if the ranks do not see the same files.
    """
    folder = Path(save_dir)
    latest, folders, problem = _list(folder)
    views = set(gather([problem or f"{latest} {sorted(folders)}"]))
    if len(views) > 1:
        raise UserError(
            f"{folder}: the ranks do not see the same files there; use storage that all nodes share "
            f"({len(views)} views)"
        )
    if problem:
        raise UserError(problem)
    if not folders:
        if latest is None or (latest and not STEP_PATTERN.fullmatch(latest)):
            return None
        names = f"names {latest}" if latest else "is empty"
        raise UserError(f"{folder}/latest {names}, but there is no step_* folder")
    damaged = []
    for name in _search_order(folder, latest, sorted(folders, reverse=True)):
        path = folders[name]
        size = manifest.folder_size(path) / 2**30
        logger.info(f"verifying {path}: {size:.2f} GiB, shared by {world} rank{'s' * (world > 1)}")
        checkpoint, problems = _verify_and_open(path, rank, world, gather)
        if checkpoint is not None:
            return checkpoint
        _check_readable(path, problems)
        damaged.append(f"{path} is damaged: {'; '.join(problems)}")
        logger.warning(f"{damaged[-1]}; trying the next one")
    raise UserError(f"{folder}: no checkpoint there is whole: {' | '.join(damaged)}")


def _list(folder: Path) -> tuple[str | None, dict[str, Path], str | None]:
    """Content of `latest`, folders of the steps, and the problem with which they cannot be read."""
    try:
        return read_latest(folder), step_folders(folder), None
    except PermissionError as error:
        return None, {}, f"{error.filename}: {manifest.UNREADABLE}no permission"


def _check_readable(path: Path, problems: list[str]) -> None:
    """Raises `UserError` if a problem is one of access, not of the files."""
    unreadable = [problem for problem in problems if manifest.UNREADABLE in problem]
    if unreadable:
        raise UserError(
            f"{path}: {'; '.join(unreadable)}; it may be whole, so no older step is taken in its place: "
            "correct this, or name another step's folder"
        )


def _search_order(folder: Path, latest: str | None, newest_first: list[str]) -> list[str]:
    """Steps in the order in which to try them: the one that `latest` names, older ones, then newer ones."""
    if latest in newest_first:
        at = newest_first.index(latest)
        return newest_first[at:] + newest_first[:at]
    if latest is None:
        problem = "is missing"
    elif not latest:
        problem = "is empty"
    else:
        problem = f"says {latest[:80]!r}, which is not there"
    logger.warning(f"{folder}/latest {problem}; taking the newest step that is whole")
    return newest_first


def _verify_and_open(
    path: Path, rank: int, world: int, gather: Gather
) -> tuple[Checkpoint | None, list[str]]:
    """(checkpoint, []) or (None, problems that any rank found); equal on every rank."""
    problems = _distinct(gather(manifest.find_problems(path, rank, world)))
    if problems:
        return None, problems
    checkpoint, own_problems = None, []
    try:
        checkpoint = Checkpoint(path)
    except UserError as error:
        own_problems = [str(error)]
    problems = _distinct(gather(own_problems))
    return (None, problems) if problems else (checkpoint, [])


def _distinct(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))
