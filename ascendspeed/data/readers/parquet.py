"""Parquet: a shard is a row group, or a slice of a large one."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ascendspeed.data.readers.shard import (
    BATCH_ROWS,
    SHARD_BYTES,
    FileReader,
    InvalidValue,
    RowBatch,
    Shard,
    decode,
    missing_value,
    split_evenly,
)
from ascendspeed.utils.errors import UserError

SLICES = 16
"""Of one row group at most: every slice reads over those before it, which costs a few per cent at this number."""


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    return _opened(path, path.stat().st_mtime_ns)


@lru_cache(4)
def _opened(path: Path, changed: int) -> pyarrow.parquet.ParquetFile:
    """A process works on few files at a time and need not parse a footer for every shard."""
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


def _columns(path: Path) -> list[str]:
    return list(_open(path).schema_arrow.names)


def _shards(path: Path, wanted: Sequence[str]) -> Iterator[Shard]:
    meta = _open(path).metadata
    for group in range(meta.num_row_groups):
        rows = meta.row_group(group)
        chunks = [rows.column(i) for i in range(rows.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted)
        for start, stop in split_evenly(rows.num_rows, min(SLICES, -(-size // SHARD_BYTES)) or 1):
            yield Shard(path, start, stop, group, weight=(stop - start) / meta.num_rows)


def _read(shard: Shard, wanted: Sequence[str]) -> Iterator[RowBatch]:
    at, before = 0, _before(shard)
    there = tuple(_columns(shard.path))
    present = [name for name in wanted if name in there]
    missing = {name: missing_value(name, there, tuple(wanted)) for name in wanted if name not in there}
    try:
        groups = _open(shard.path).iter_batches(
            BATCH_ROWS, row_groups=[shard.group], columns=present, use_threads=False
        )
        for batch in groups:
            first = max(shard.start - at, 0)
            part = batch[first : max(shard.stop - at, 0)]
            if part.num_rows:
                columns = {
                    name: to_python(part[name]) if name in present else [missing[name]] * part.num_rows
                    for name in wanted
                }
                yield RowBatch.at(range(before + at + first, before + at + first + part.num_rows), columns)
            at += batch.num_rows
            if at >= shard.stop:
                return
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{shard.path}: row group {shard.group} cannot be read: {error}") from error


def _before(shard: Shard) -> int:
    """Rows of the groups before that of a shard."""
    meta = _open(shard.path).metadata
    return sum(meta.row_group(group).num_rows for group in range(shard.group))


def to_python(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    """Python values of an Arrow array; binary ones are taken as text."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not look into strings when it reads them
        nested = pyarrow.types.is_nested(column.type)
        values = list(map(_value, column)) if nested else column.cast(pyarrow.large_binary()).to_pylist()
    return [decode(v) if isinstance(v, bytes) else v for v in values]


def _value(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return InvalidValue.NOT_UTF8


PARQUET = FileReader(_columns, _shards, _read, lambda path, place: f"row {place + 1}")
