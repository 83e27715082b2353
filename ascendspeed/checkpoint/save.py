"""Saves a training checkpoint: every rank writes what it owns at the same time; rank 0 publishes the whole, or nothing."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ascendspeed.checkpoint import manifest, ownership, safetensors_io
from ascendspeed.checkpoint.fragment import Fragment, TrainState, owned_slice
from ascendspeed.checkpoint.load import RNG, ShardIndex, shard_name
from ascendspeed.checkpoint.paths import MANIFEST, step_name
from ascendspeed.config import schema
from ascendspeed.config.schema import Run
from ascendspeed.utils import atomic
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

DISK_MARGIN = 64 << 20
"""Bytes left free on the disk beyond the checkpoint itself, for logs and small files."""


def save_checkpoint(
    folder: str | Path,
    state: TrainState,
    run: Run,
    fragments: Iterable[Fragment],
    rng: Mapping[str, Tensor],
    rank: int,
    world: int,
    barrier: Callable[[], None],
    keep: int | None = None,
    token: str = "",
) -> Path:
    """Writes `folder`/step_XXXXXXX and points `folder`/latest at it; every rank calls this with its own fragments.

    What exists is not touched until the new checkpoint is whole and on the disk. `keep`: how many of the newest steps up to
    this one to keep; one that cannot be removed is a warning of rank 0. Raises the same `UserError` on every rank
    when a rank could not write, the disk is too small, or (with the `token` of `owner.claim`) another run saves there by now.
    """
    team = _Team(Path(folder), step_name(state.step), rank, world, barrier, token)
    shard: safetensors_io.ShardWriter | None = None

    def announce() -> dict[str, Any]:
        nonlocal shard
        team.enter()
        shard = _shard(fragments, rng, {"step": str(state.step), "world": str(world), "rank": str(rank)})
        return {"size": shard.size}

    def write() -> dict[str, Any]:
        return {"size": shard.size, "sha256": shard.write(team.shard)}

    try:
        team.together("size", announce, lambda reports: _check_space(team, sum(r["size"] for r in reports)))
        team.together("written", write, lambda reports: _publish(team, state, run, reports))
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is what must be told
            team.shard.unlink(missing_ok=True)
        raise
    if keep and rank == 0:  # not before all know that it is saved: an old one that stays is no reason to stop
        _prune(team.folder, team.final.name, keep)
    return team.final


def _shard(
    fragments: Iterable[Fragment], rng: Mapping[str, Tensor], metadata: dict[str, str]
) -> safetensors_io.ShardWriter:
    tensors, cuts = {}, {}
    for fragment in fragments:
        if (piece := owned_slice(fragment)) is None:
            continue
        address, view = piece
        if tensors.setdefault(str(address), view) is not view:
            raise ValueError(f"two fragments at {address}")
        cuts[fragment.name] = dataclasses.asdict(fragment.cut)
    tensors |= {f"{RNG}|{name}": t for name, t in rng.items()}
    return safetensors_io.ShardWriter(tensors, metadata | {"cuts": json.dumps(cuts)})


@dataclass(frozen=True)
class _Team:
    """The ranks of one save. They speak through small files in the temporary folder: no collective but the barrier."""

    folder: Path
    name: str
    rank: int
    world: int
    barrier: Callable[[], None]
    token: str

    @property
    def final(self) -> Path:
        return self.folder / self.name

    def beside(self, kind: str) -> Path:
        """A name of this run's own beside `final`."""
        return self.folder / ".".join(["", self.name, *filter(None, [self.token]), kind])

    @property
    def temporary(self) -> Path:
        return self.beside("tmp")

    @property
    def shard(self) -> Path:
        return self.temporary / shard_name(self.rank, self.world)

    @property
    def verdict(self) -> Path:
        """Where rank 0 says that nothing was saved: beside the temporary folder, which gets another name."""
        return self.beside("failed")

    def report(self, about: str, rank: int) -> Path:
        return self.temporary / f"{rank:05}.{about}"

    def enter(self) -> None:
        """Makes the temporary folder; what a killed save left is gone, or will be overwritten."""
        if self.rank == 0:
            self.check_owner()
        self.temporary.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            _tidy(self.folder, self.temporary)
        for old in (self.report("size", self.rank), self.report("written", self.rank), self.shard):
            old.unlink(missing_ok=True)

    def check_owner(self) -> None:
        if self.token:
            ownership.check_ownership(self.folder, self.token)

    def together(
        self, about: str, work: Callable[[], dict[str, Any]], judge: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        """Every rank works and reports, rank 0 judges the reports, and all go on or all raise."""
        mine = cause = verdict = None
        try:
            report = work()
        except Exception as error:  # whatever it is, the others must not wait for this rank
            mine, report = error, {"error": _reason(error)}
        try:
            self.temporary.mkdir(
                parents=True, exist_ok=True
            )  # where that was what failed, the reason is still told
            self.report(about, self.rank).write_text(json.dumps(report))
        except OSError as error:
            mine = mine or error
        self.barrier()
        if self.rank == 0:
            try:
                judge(self._reports(about))
            except (UserError, OSError) as error:
                cause, verdict = error, f"{self.final} was not saved: {_reason(error)}"
                _mark(self.verdict, verdict)
        self.barrier()
        if mine and not isinstance(mine, UserError | OSError):
            raise mine  # a mistake in the program keeps its traceback
        if mine or verdict or self.verdict.exists():
            raise UserError(
                verdict or self._read_verdict() or f"{self.final} was not saved: {_reason(mine)}"
            ) from mine or cause

    def _read_verdict(self) -> str:
        with contextlib.suppress(OSError):
            return self.verdict.read_text()
        return ""

    def _reports(self, about: str) -> list[dict[str, Any]]:
        reports = []
        for rank in range(self.world):
            try:
                reports.append(json.loads(self.report(about, rank).read_text()))
            except (OSError, ValueError):
                raise UserError(
                    f"rank {rank} could not report (is {self.folder} on storage that all nodes share?)"
                ) from None
            if "error" in reports[-1]:
                raise UserError(f"rank {rank}: {reports[-1]['error']}")
        return reports


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return str(error) or repr(error)


def _mark(verdict: Path, text: str) -> None:
    """An empty mark says as much as the others need, on a disk that takes no more; without any, rank 0 leaves."""
    with contextlib.suppress(OSError):
        verdict.touch()
        verdict.write_text(text)


def _check_space(team: _Team, size: int) -> None:
    free = shutil.disk_usage(team.temporary).free
    if size + DISK_MARGIN > free:
        gib = f"it takes {size / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free"
        raise UserError(f"{gib} in {team.folder}; free some space or choose another --save")


def _publish(team: _Team, state: TrainState, run: Run, reports: list[dict[str, Any]]) -> None:
    """Checks that the shards make a whole, writes what is written last, and puts it in place."""
    temporary, final = team.temporary, team.final
    if (team.folder / "latest").is_dir():  # before the new one has its name: nothing would point at it
        raise UserError(f"{team.folder}/latest is a folder; remove it")
    ShardIndex(temporary, state.step, team.world)
    listed = {shard_name(rank, team.world): report for rank, report in enumerate(reports)}
    texts = {
        "run.json": schema.to_dict(run),
        "train_state.json": dataclasses.asdict(state) | {"world": team.world},
    }
    for name, values in texts.items():
        atomic.replace_file(temporary / name, json.dumps(values, indent=1) + "\n")
        listed[name] = {
            "size": (temporary / name).stat().st_size,
            "sha256": safetensors_io.file_sha256(temporary / name),
        }
    atomic.replace_file(temporary / MANIFEST, manifest.manifest_text(state.step, listed))
    for path in temporary.iterdir():
        if path.name not in listed and path.name != MANIFEST:
            path.unlink()
    atomic.sync_path(temporary)
    point = atomic.stage_file(team.folder / "latest", final.name + "\n")
    replaced = team.folder / f".{final.name}.old"
    team.check_owner()
    if final.exists():
        os.rename(final, replaced)  # `find` knows this name, should we be killed before the next line
    os.rename(temporary, final)
    atomic.sync_path(team.folder)
    point()
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Removes all but the `keep` newest steps up to `newest`; later ones, of a run that was given up, are left alone."""
    try:
        steps = sorted(
            p.name for p in folder.iterdir() if re.fullmatch(r"step_\d{7}", p.name) and p.name <= newest
        )
    except OSError as error:
        logger.warning(f"{_reason(error)}; older checkpoints stay")
        return
    for name in steps[:-keep]:
        gone = folder / f".{name}.tmp"
        try:
            os.rename(
                folder / name, gone
            )  # a removal that is cut short must not look like a damaged checkpoint
        except FileNotFoundError:
            continue  # somebody else removed it
        except OSError as error:
            logger.warning(f"{_reason(error)}; this older checkpoint stays")
        shutil.rmtree(gone, ignore_errors=True)


def _tidy(folder: Path, current: Path) -> None:
    """Removes what killed and failed saves left behind, and ends a replacement that was cut short."""
    for path in (*folder.glob(".step_*.failed"), folder / ".latest.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(".step_*.tmp"):
        if path != current:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*.old"):
        if (final := folder / path.name[1 : -len(".old")]).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, final)
