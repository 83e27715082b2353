"""Saves training checkpoints: all ranks write shards in parallel, then rank 0 publishes all or nothing."""

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
from ascendspeed.checkpoint.fragment import Fragment, TrainState, owned_slice, spec_to_json
from ascendspeed.checkpoint.load import RNG, ShardIndex, shard_name
from ascendspeed.checkpoint.paths import MANIFEST, step_name
from ascendspeed.config import schema
from ascendspeed.config.schema import Run
from ascendspeed.utils import atomic
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

DISK_MARGIN = 64 << 20
"""Bytes that must stay free on the disk beyond the checkpoint itself, for logs and small files."""


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
    """Writes `folder`/step_XXXXXXX and points `folder`/latest to it; every rank calls this with its own
    fragments.

    Existing checkpoints are not touched until the new one is complete and on the disk. `keep`: number of
    steps to keep, this one included; a failed removal is only a warning. `token`: from
    `ownership.claim_folder`.

    Raises the same `UserError` on every rank if a rank could not write, the disk is too small, or another run
    owns the folder.
    """
    group = _SaveGroup(Path(folder), step_name(state.step), rank, world, barrier, token)
    shard: safetensors_io.ShardWriter | None = None

    def announce_size() -> dict[str, Any]:
        nonlocal shard
        group.prepare()
        metadata = {"step": str(state.step), "world": str(world), "rank": str(rank)}
        shard = _shard_writer(fragments, rng, metadata)
        return {"size": shard.size}

    def write() -> dict[str, Any]:
        return {"size": shard.size, "sha256": shard.write(group.shard)}

    try:
        group.run_phase(
            "size", announce_size, lambda reports: _check_space(group, sum(r["size"] for r in reports))
        )
        group.run_phase("written", write, lambda reports: _publish(group, state, run, reports))
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            group.shard.unlink(missing_ok=True)
        raise
    if (
        keep and rank == 0
    ):  # after all ranks know that it is saved: an old checkpoint that stays is not an error
        _prune(group.folder, group.final.name, keep)
    return group.final


def _shard_writer(
    fragments: Iterable[Fragment], rng: Mapping[str, Tensor], metadata: dict[str, str]
) -> safetensors_io.ShardWriter:
    """Writer of this rank's shard. Raises `ValueError` for two fragments at one address."""
    tensors: dict[str, Tensor] = {}
    specs = {}
    for fragment in fragments:
        if (owned := owned_slice(fragment)) is None:
            continue
        address, view = owned
        if tensors.setdefault(str(address), view) is not view:
            raise ValueError(f"two fragments at {address}")
        specs[fragment.name] = spec_to_json(fragment.spec)
    tensors |= {f"{RNG}|{name}": t for name, t in rng.items()}
    return safetensors_io.ShardWriter(tensors, metadata | {"cuts": json.dumps(specs)})


@dataclass(frozen=True)
class _SaveGroup:
    """The ranks of one save.

    They exchange small files in the temporary folder and use no collective but the barrier.
    """

    folder: Path
    name: str
    rank: int
    world: int
    barrier: Callable[[], None]
    token: str

    @property
    def final(self) -> Path:
        return self.folder / self.name

    def _hidden(self, suffix: str) -> Path:
        """A name beside `final` that only this run uses."""
        return self.folder / ".".join(["", self.name, *filter(None, [self.token]), suffix])

    @property
    def temporary(self) -> Path:
        return self._hidden("tmp")

    @property
    def shard(self) -> Path:
        return self.temporary / shard_name(self.rank, self.world)

    @property
    def failure(self) -> Path:
        """File of rank 0 that says why nothing was saved; beside the temporary folder, which is renamed on
        success.
        """
        return self._hidden("failed")

    def report(self, phase: str, rank: int) -> Path:
        """File in which a rank reports a phase."""
        return self.temporary / f"{rank:05}.{phase}"

    def prepare(self) -> None:
        """Makes the temporary folder; files of a killed save are deleted, or will be overwritten."""
        if self.rank == 0:
            self.check_owner()
        self.temporary.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            _tidy(self.folder, self.temporary)
        for old in (self.report("size", self.rank), self.report("written", self.rank), self.shard):
            old.unlink(missing_ok=True)

    def check_owner(self) -> None:
        """Raises `OwnershipLost` if another run owns the folder now."""
        if self.token:
            ownership.check_ownership(self.folder, self.token)

    def run_phase(
        self, phase: str, work: Callable[[], dict[str, Any]], judge: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        """Runs `work` on every rank and `judge` with all reports on rank 0; then all ranks continue or all
        raise.
        """
        own_error, failure, cause = None, "", None
        try:
            report = work()
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            own_error = error
            report = {"error": _describe(error, self.shard)}
        try:
            self.temporary.mkdir(parents=True, exist_ok=True)  # its creation may be what failed
            self.report(phase, self.rank).write_text(json.dumps(report))
        except OSError as error:
            own_error = own_error or error
        self.barrier()
        if self.rank == 0:
            try:
                judge(self._reports(phase))
            except (UserError, OSError) as error:
                cause = error
                failure = f"{self.final} was not saved: {_describe(error, self.final)}"
                _write_failure(self.failure, failure)
        self.barrier()
        if own_error and not isinstance(own_error, UserError | OSError):
            raise own_error  # a bug keeps its traceback
        if own_error or failure or self.failure.exists():
            own = _describe(own_error, self.shard) if own_error else ""
            failure = failure or self._read_failure() or f"{self.final} was not saved: {own}"
            raise UserError(failure) from own_error or cause

    def _read_failure(self) -> str:
        with contextlib.suppress(OSError):
            return self.failure.read_text()
        return ""

    def _reports(self, phase: str) -> list[dict[str, Any]]:
        """Reports of all ranks. Raises `UserError` if one is missing or reports an error."""
        reports = []
        for rank in range(self.world):
            try:
                reports.append(json.loads(self.report(phase, rank).read_text()))
            except (OSError, ValueError):
                free = shutil.disk_usage(self.folder).free
                if free < DISK_MARGIN:
                    reason = f"only {free / 2**20:.0f} MiB are free in {self.folder}: free some space"
                else:
                    reason = f"is {self.folder} on storage that all nodes share?"
                raise UserError(f"rank {rank} could not report ({reason})") from None
            if "error" in reports[-1]:
                raise UserError(f"rank {rank}: {reports[-1]['error']}")
        return reports


def _describe(error: BaseException, path: Path) -> str:
    """Text of an error; `path`: what was being written, for an error that names no file."""
    if isinstance(error, OSError) and error.strerror:
        path = Path(error.filename or path)
        return f"{path}: {atomic.describe_write_error(path, error)}"
    return str(error) or repr(error)


def _write_failure(path: Path, text: str) -> None:
    """On a full disk an empty file is enough to signal failure to the other ranks; without any, rank 0 still
    raises.
    """
    with contextlib.suppress(OSError):
        path.touch()
        path.write_text(text)


def _check_space(group: _SaveGroup, size: int) -> None:
    """Raises `UserError` if the disk has less than `size` bytes and the margin."""
    free = shutil.disk_usage(group.temporary).free
    if size + DISK_MARGIN > free:
        margin = f"{DISK_MARGIN / 2**20:.0f} MiB must stay free"
        figures = f"it takes {size / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free"
        raise UserError(
            f"{figures} in {group.folder}, of which {margin}; free some space or choose another --save"
        )


def _publish(group: _SaveGroup, state: TrainState, run: Run, reports: list[dict[str, Any]]) -> None:
    """Checks that the shards are complete, writes the JSON files and the manifest, and renames the folder."""
    temporary, final = group.temporary, group.final
    if (
        group.folder / "latest"
    ).is_dir():  # checked before the rename: else nothing would point to the checkpoint
        raise UserError(f"{group.folder}/latest is a folder; remove it")
    ShardIndex(temporary, state.step, group.world)
    listed = {shard_name(rank, group.world): report for rank, report in enumerate(reports)}
    texts = {
        "run.json": schema.to_dict(run),
        "train_state.json": dataclasses.asdict(state) | {"world": group.world},
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
    replace_latest = atomic.stage_file(group.folder / "latest", final.name + "\n")
    replaced = group.folder / f".{final.name}.old"
    group.check_owner()
    if final.exists():
        os.rename(final, replaced)  # `step_folders` knows this name, in case of a kill before the next line
    os.rename(temporary, final)
    atomic.sync_path(group.folder)
    replace_latest()
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Deletes all but the `keep` newest steps up to `newest`; later steps, of an abandoned run, stay."""
    try:
        steps = sorted(
            path.name
            for path in folder.iterdir()
            if re.fullmatch(r"step_\d{7}", path.name) and path.name <= newest
        )
    except OSError as error:
        logger.warning(f"{_describe(error, folder)}; older checkpoints stay")
        return
    for name in steps[:-keep]:
        hidden = folder / f".{name}.tmp"
        try:
            os.rename(folder / name, hidden)  # a half-deleted folder must not look like a damaged checkpoint
        except FileNotFoundError:
            continue  # already deleted by someone else
        except OSError as error:
            logger.warning(f"{_describe(error, hidden)}; this older checkpoint stays")
        shutil.rmtree(hidden, ignore_errors=True)


def _tidy(folder: Path, current: Path) -> None:
    """Deletes remains of killed and failed saves, and completes an interrupted replacement."""
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
