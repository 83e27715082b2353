"""Writes the tensors of planned files: block by block, on several threads, with casts and checks for NaN and
infinity.
"""

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

BLOCK_BYTES = 1 << 22
"""Bytes that are read, checked and written at a time: they fit into a processor's cache."""


@dataclass(frozen=True)
class PlannedFile:
    """One file to write."""

    path: str
    """Path in the target folder."""
    tensors: tuple[StoredTensor, ...]
    create: Callable[[Path, Specs], PreallocatedFile]

    def specs(self, reader: CheckpointReader, dtype: torch.dtype | None) -> Specs:
        """Types and shapes of its tensors, cast to `dtype` if it is given."""
        return {
            entry.name: (dtype or reader.dtypes[entry.parameter.name], entry.shape) for entry in self.tensors
        }


@dataclass(frozen=True)
class NonFiniteTensors:
    """Names of tensors that hold NaN or infinity."""

    nan: set[str] = field(default_factory=set)
    infinite: set[str] = field(default_factory=set)

    def check(self, name: str, block: Tensor) -> None:
        """Records the tensor if this block of it is not finite; infinity beside NaN in a block is not
        recorded.
        """
        low, high = block.aminmax()
        if low.isnan():
            self.nan.add(name)
        elif low.isinf() or high.isinf():
            self.infinite.add(name)


def size(reader: CheckpointReader, files: Iterable[PlannedFile], dtype: torch.dtype | None) -> int:
    """Bytes of all tensors in the files."""
    return sum(nbytes(*spec) for file in files for spec in file.specs(reader, dtype).values())


def write(
    reader: CheckpointReader,
    folder: Path,
    files: Sequence[PlannedFile],
    dtype: torch.dtype | None,
    advance: Advance,
    allow_nan: bool = False,
) -> None:
    """Writes every file; they are on the disk when this returns. Prints a note on tensors that hold infinity.

    Raises `UserError` naming the tensors that hold NaN (unless `allow_nan`), or one with values too large for
    `dtype`.
    """
    non_finite = NonFiniteTensors()
    outputs = []
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs.append(file.create(path, file.specs(reader, dtype)))
    pool = ThreadPoolExecutor(workers())
    try:
        jobs = [
            pool.submit(_write_tensor, reader, output, entry, advance, non_finite)
            for file, output in zip(files, outputs, strict=True)
            for entry in file.tensors
        ]
        for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for output in outputs:
            output.close()
    if non_finite.infinite:
        names = shorten_list(sorted(non_finite.infinite))
        logger.info(f"note: {reader.path} holds infinity in {names}")
    if non_finite.nan and not allow_nan:
        names = shorten_list(sorted(non_finite.nan))
        raise UserError(f"{reader.path} holds NaN in {names}; nothing was written (--allow-nan keeps them)")


def workers() -> int:
    """Number of threads of a conversion: they wait for memory and for the disk, so a few are enough."""
    return min(THREADS, os.cpu_count() or 1)


def _write_tensor(
    reader: CheckpointReader,
    output: PreallocatedFile,
    entry: StoredTensor,
    advance: Advance,
    non_finite: NonFiniteTensors,
) -> None:
    dtype = output.specs[entry.name][0]
    padding = nbytes(*output.specs[entry.name])
    for tile in entry.slices:
        for rows in row_blocks(tile, reader.dtypes[entry.parameter.name]):
            block = reader.read_block(entry.parameter.name, rows).contiguous()
            non_finite.check(entry.name, block)
            converted = cast(entry.name, block, dtype)
            output.write(entry.name, rows.local_row, converted)
            advance(converted.nbytes)
            padding -= converted.nbytes
    output.done(entry.name)
    advance(padding)


def row_blocks(tile: Slice2D, dtype: torch.dtype) -> Iterable[Slice2D]:
    """Splits a rectangle into blocks of whole rows, of about `BLOCK_BYTES` each."""
    most = max(1, BLOCK_BYTES // (tile.columns * dtype.itemsize))
    for first in range(0, tile.rows, most):
        yield tile._replace(
            row=tile.row + first, local_row=tile.local_row + first, rows=min(most, tile.rows - first)
        )


def cast(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts a block; NaN and infinity stay. Raises `UserError` if a finite value would become infinite."""
    if block.dtype == dtype:
        return block
    converted = block.to(dtype)
    if not (converted.max().isfinite() and converted.min().isfinite()):
        overflows = block.isfinite() & ~converted.isfinite()
        if overflows.any():
            largest = block[overflows].abs().max().item()
            type_name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name} holds finite values up to {largest:.3g}, too large for {type_name}; choose another "
                f"--dtype (--gguf-type of a GGUF file)"
            )
    return converted
