"""Writes a source into files, by what each of their tensors holds of ours: block by block, several at a time."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ascendspeed.conversion.checkpoint_reader import THREADS, CheckpointReader
from ascendspeed.conversion.output_files import PreallocatedFile, Specs, nbytes
from ascendspeed.models.param_mapping import Slice2D, StoredTensor
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import Advance
from ascendspeed.utils.text import shorten_list

logger = logging.getLogger(__name__)

BLOCK = 1 << 22
"""Bytes that are read, checked and written at a time: a processor's cache holds them."""


@dataclass(frozen=True)
class PlannedFile:
    """One file to write."""

    path: str
    """Under the target's folder."""
    holds: tuple[StoredTensor, ...]
    create: Callable[[Path, Specs], PreallocatedFile]

    def specs(self, source: CheckpointReader, dtype: torch.dtype | None) -> Specs:
        """Types and shapes of its tensors, cast to `dtype` when one is given."""
        return {
            entry.name: (dtype or source.dtypes[entry.parameter.name], entry.shape) for entry in self.holds
        }


@dataclass(frozen=True)
class NonFiniteTensors:
    """Names of tensors that hold what is no number."""

    nan: set[str] = field(default_factory=set)
    infinite: set[str] = field(default_factory=set)

    def look(self, name: str, block: Tensor) -> None:
        """NaN hides infinity here: only one of them is reported for a block."""
        low, high = block.aminmax()
        if low.isnan():
            self.nan.add(name)
        elif low.isinf() or high.isinf():
            self.infinite.add(name)


def size(source: CheckpointReader, files: Iterable[PlannedFile], dtype: torch.dtype | None) -> int:
    """Bytes of all tensors in the files."""
    return sum(nbytes(*spec) for file in files for spec in file.specs(source, dtype).values())


def write(
    source: CheckpointReader,
    folder: Path,
    files: Sequence[PlannedFile],
    dtype: torch.dtype | None,
    advance: Advance,
    allow_nan: bool = False,
) -> None:
    """Writes every file; they are on the disk when this returns.

    A note names tensors that hold infinity.
    Raises `UserError` naming the tensors that hold NaN (unless `allow_nan`), or one that is too large for `dtype`.
    """
    seen = NonFiniteTensors()
    opened = []
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        opened.append(file.create(folder / file.path, file.specs(source, dtype)))
    pool = ThreadPoolExecutor(workers())
    try:
        jobs = [
            pool.submit(_write_one, source, target, entry, advance, seen)
            for file, target in zip(files, opened, strict=True)
            for entry in file.holds
        ]
        for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for target in opened:
            target.close()
    if seen.infinite:
        logger.info(f"note: {source.where} holds infinity in {shorten_list(sorted(seen.infinite))}")
    if seen.nan and not allow_nan:
        raise UserError(
            f"{source.where} holds NaN in {shorten_list(sorted(seen.nan))}; nothing was written (--allow-nan keeps them)"
        )


def workers() -> int:
    """Threads that a conversion keeps busy: they wait for memory and for the disk, so a few are enough."""
    return min(THREADS, os.cpu_count() or 1)


def _write_one(
    source: CheckpointReader,
    target: PreallocatedFile,
    entry: StoredTensor,
    advance: Advance,
    seen: NonFiniteTensors,
) -> None:
    dtype = target.specs[entry.name][0]
    padding = nbytes(*target.specs[entry.name])
    for tile in entry.slices:
        for piece in pieces(tile, source.dtypes[entry.parameter.name]):
            block = source.block(entry.parameter.name, piece).contiguous()
            seen.look(entry.name, block)
            cast = _cast(entry.name, block, dtype)
            target.write(entry.name, piece.local_row, cast)
            advance(cast.nbytes)
            padding -= cast.nbytes
    target.done(entry.name)
    advance(padding)


def pieces(tile: Slice2D, dtype: torch.dtype) -> Iterable[Slice2D]:
    """A tile in blocks of whole rows, of about BLOCK bytes each."""
    most = max(1, BLOCK // (tile.columns * dtype.itemsize))
    for at in range(0, tile.rows, most):
        yield tile._replace(row=tile.row + at, local_row=tile.local_row + at, rows=min(most, tile.rows - at))


def _cast(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises `UserError` when a finite value would become infinite; NaN and infinity stay what they are."""
    if block.dtype == dtype:
        return block
    cast = block.to(dtype)
    if not (cast.max().isfinite() and cast.min().isfinite()):
        lost = block.isfinite() & ~cast.isfinite()
        if lost.any():
            largest, kind = block[lost].abs().max().item(), str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name} holds finite values up to {largest:.3g}, too large for {kind}; choose another --dtype"
            )
    return cast
