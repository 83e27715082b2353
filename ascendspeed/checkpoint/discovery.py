"""Finds the newest checkpoint that is whole. All ranks call this together and get the same answer."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ascendspeed.checkpoint import manifest
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.paths import MANIFEST, STEP_PATTERN, read_latest, step_folders
from ascendspeed.utils.errors import UserError

if TYPE_CHECKING:
    from ascendspeed.distributed.process_groups import ProcessGrid

logger = logging.getLogger(__name__)

Gather = Callable[[list[str]], list[str]]
"""Takes this rank's texts, returns those of all ranks, rank after rank, the same on every rank."""


def _alone(mine: list[str]) -> list[str]:
    return mine


@dataclass(frozen=True)
class Readers:
    """The ranks that open a checkpoint together: each file is verified by one of them. As it stands: this process, alone."""

    rank: int = 0
    world: int = 1
    gather: Gather = _alone

    @classmethod
    def of(cls, grid: "ProcessGrid") -> "Readers":
        """All ranks of a grid."""
        return cls(grid.rank, grid.world, lambda mine: list(chain(*grid.all_gather_object(mine))))

    def open(self, path: str | Path) -> Checkpoint:
        """`open_checkpoint` by these ranks."""
        return open_checkpoint(path, self.rank, self.world, self.gather)


def open_checkpoint(path: str | Path, rank: int = 0, world: int = 1, gather: Gather = _alone) -> Checkpoint:
    """The checkpoint in a step's folder, or the newest good one in a folder of steps, verified.

    Raises `UserError` when there is none, or when the step that was asked for is damaged.
    """
    path = Path(path)
    if not ((path / MANIFEST).exists() or STEP_PATTERN.fullmatch(path.name)):
        if (found := find_checkpoint(path, rank, world, gather)) is None:
            raise UserError(f"{path}: no training checkpoint lies there (no step_* folder)")
        return found
    checkpoint, wrong = _examine(path, rank, world, gather)
    if checkpoint is None:
        raise UserError(f"{path} is damaged: {'; '.join(wrong)}")
    return checkpoint


def find_checkpoint(
    save_dir: str | Path, rank: int = 0, world: int = 1, gather: Gather = _alone
) -> Checkpoint | None:
    """The checkpoint that `latest` names, or else the next older good one, with a warning that names what is wrong.

    Every rank logs the same lines. Returns None when nothing lies there at all.
    Raises `UserError` when something does and nothing of it is good, or when the ranks do not see the same files.
    """
    folder = Path(save_dir)
    newest, there = read_latest(folder), step_folders(folder)
    if len(seen := set(gather([f"{newest} {sorted(there)}"]))) > 1:
        raise UserError(
            f"{folder}: the ranks do not see the same files there; use storage that all nodes share ({len(seen)} views)"
        )
    if not there:
        if newest is None or (newest and not STEP_PATTERN.fullmatch(newest)):
            return None
        raise UserError(
            f"{folder}/latest {f'names {newest}' if newest else 'is empty'}, but no step_* folder lies there"
        )
    order = _order(folder, newest, sorted(there, reverse=True))
    wrongs = []
    for name in order:
        logger.info(
            f"verifying {there[name]}: {manifest.folder_size(there[name]) / 2**30:.2f} GiB, shared by {world} rank{'s' * (world > 1)}"
        )
        checkpoint, wrong = _examine(there[name], rank, world, gather)
        if checkpoint is not None:
            return checkpoint
        wrongs.append(f"{there[name]} is damaged: {'; '.join(wrong)}")
        logger.warning(f"{wrongs[-1]}; trying the next one")
    raise UserError(f"{folder}: no checkpoint there is whole: {' | '.join(wrongs)}")


def _order(folder: Path, newest: str | None, newest_first: list[str]) -> list[str]:
    """Steps in the order in which to try them: what `latest` names, the older ones, and at last the newer ones."""
    if newest in newest_first:
        at = newest_first.index(newest)
        return newest_first[at:] + newest_first[:at]
    wrong = (
        "is missing"
        if newest is None
        else "is empty"
        if not newest
        else f"says {newest[:80]!r}, which is not there"
    )
    logger.warning(f"{folder}/latest {wrong}; taking the newest step that is whole")
    return newest_first


def _examine(path: Path, rank: int, world: int, gather: Gather) -> tuple[Checkpoint | None, list[str]]:
    """Verifies, then opens; what any rank finds wrong, all know."""
    if wrong := list(dict.fromkeys(gather(manifest.find_problems(path, rank, world)))):
        return None, wrong
    checkpoint, mine = None, []
    try:
        checkpoint = Checkpoint(path)
    except UserError as error:
        mine = [str(error)]
    wrong = list(dict.fromkeys(gather(mine)))
    return (None, wrong) if wrong else (checkpoint, [])
