"""Reads parquet: a shard is a row group, or a range of rows of a large one."""

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
from ascendspeed.utils.text import first_line

MAX_SHARDS_PER_GROUP = 16
"""A shard reads over the rows of its group before it, which costs a few per cent at this number."""


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    return _open_version(path, path.stat().st_mtime_ns)


@lru_cache(4)
def _open_version(path: Path, modified: int) -> pyarrow.parquet.ParquetFile:
    """Opens a file once: a process works on few files at a time and need not parse a footer for every
    shard."""
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        file.schema_arrow.names  # noqa: B018 - Arrow does not validate names before
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a parquet file: {first_line(error)}") from error
    metadata = file.metadata
    rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if rows != metadata.num_rows:
        raise UserError(
            f"{path} is damaged: its row groups have {rows:,} rows, its footer counts {metadata.num_rows:,}"
        )
    return file


def _columns(path: Path) -> list[str]:
    return list(_open(path).schema_arrow.names)


def _shards(path: Path, needed: Sequence[str]) -> Iterator[Shard]:
    metadata = _open(path).metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        # Of all columns: Arrow ends the whole process when it parses a damaged description of a column.
        parts = max(1, min(MAX_SHARDS_PER_GROUP, -(-rows.total_byte_size // SHARD_BYTES)))
        for start, stop in split_evenly(rows.num_rows, parts):
            yield Shard(path, start, stop, group, weight=(stop - start) / metadata.num_rows)


def _read(shard: Shard, needed: Sequence[str]) -> Iterator[RowBatch]:
    group_begin = _rows_before_group(shard)
    names = tuple(_columns(shard.path))
    present = [name for name in needed if name in names]
    missing = {name: missing_value(name, names, tuple(needed)) for name in needed if name not in names}
    row = 0  # of the group
    try:
        batches = _open(shard.path).iter_batches(
            BATCH_ROWS, row_groups=[shard.group], columns=present, use_threads=False
        )
        for batch in batches:
            first = max(shard.start - row, 0)
            part = batch[first : max(shard.stop - row, 0)]
            if part.num_rows:
                columns = {}
                for name in needed:
                    columns[name] = (
                        to_python(part[name]) if name in present else [missing[name]] * part.num_rows
                    )
                location = group_begin + row + first
                yield RowBatch.with_locations(range(location, location + part.num_rows), columns)
            row += batch.num_rows
            if row >= shard.stop:
                return
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)  # Arrow's messages have several lines
        raise UserError(f"{shard.path}: row group {shard.group} cannot be read: {reason}") from error


def _rows_before_group(shard: Shard) -> int:
    metadata = _open(shard.path).metadata
    return sum(metadata.row_group(group).num_rows for group in range(shard.group))


def to_python(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    """Converts an Arrow array to Python values; binary values become text."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not validate strings when it reads them
        if pyarrow.types.is_nested(column.type):
            values = [_scalar_to_python(scalar) for scalar in column]
        else:
            values = column.cast(pyarrow.large_binary()).to_pylist()
    return [decode(value) if isinstance(value, bytes) else value for value in values]


def _scalar_to_python(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return InvalidValue.NOT_UTF8


PARQUET = FileReader(_columns, _shards, _read, lambda path, location: f"row {location + 1}")
