"""Reads files that have no random access (json arrays, csv, .gz) in order; their shards carry the rows."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ascendspeed.data.readers.lines import BOM, JSONL, json_row, text_row
from ascendspeed.data.readers.shard import (
    SHARD_BYTES,
    FileReader,
    InvalidValue,
    RowBatch,
    Shard,
    column_names,
    rows_to_batch,
    select_columns,
    split_batch,
)
from ascendspeed.utils.errors import UserError

NumberedRows = Iterator[tuple[int, Any]]
"""Rows with their numbers, from 1."""
RowParser = Callable[[BinaryIO], NumberedRows]
ROW_OVERHEAD = 64
"""Bytes that every row counts for, beside its text."""


def csv_rows(file: BinaryIO) -> NumberedRows:
    """Parses csv with a header; a row with more or fewer cells than the header is invalid, because cells
    cannot be assigned."""
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""))
    rows = (cells for cells in lines if cells)
    header = next(rows, [])
    return enumerate((_csv_row(header, cells) for cells in rows), 1)


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        detail = f"{len(cells)} cells, the header has {len(header)}"
        return InvalidValue("wrong number of cells", detail)
    return dict(zip(header, cells, strict=True))


def line_rows(parse: Callable[[bytes], Any]) -> RowParser:
    """Builds a parser for files of lines, each parsed by `parse`."""

    def rows(file: BinaryIO) -> NumberedRows:
        for number, line in enumerate(file, 1):
            row = parse(line.removeprefix(BOM) if number == 1 else line)
            if row is not None:
                yield number, row

    return rows


def array_rows(file: BinaryIO) -> Iterator[Any]:
    """Yields the elements of a JSON array one at a time. Raises `ValueError` if the text is damaged."""
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
    decoder = json.JSONDecoder()
    buffer, position = "", 0
    last_separator = ""
    step = 1 << 16
    while chunk := text.read(step):
        buffer, position = buffer[position:] + chunk, 0
        while True:
            while position < len(buffer) and buffer[position] in "[], \t\r\n":  # between elements (objects)
                last_separator = buffer[position].strip() or last_separator
                position += 1
            try:
                row, position = decoder.raw_decode(buffer, position)
            except (ValueError, RecursionError):
                break  # the element is not complete yet, or the file is damaged
            last_separator = ""
            yield row if isinstance(row, dict) else InvalidValue.MALFORMED
        step = max(step, 2 * (len(buffer) - position))  # doubling keeps a huge element from many parses
    if buffer[position:] or last_separator != "]":
        context = buffer[position : position + 40]
        raise ValueError(f"the array does not end, or no JSON value begins at {context!r}")


def numbered_array(file: BinaryIO) -> NumberedRows:
    """Yields the elements of a JSON array with their numbers."""
    return enumerate(array_rows(file), 1)


def json_rows(file: BinaryIO) -> NumberedRows:
    """Parses a JSON array or lines of objects: both have the suffix .json."""
    return numbered_array(file) if _is_array(file.peek(1 << 12)) else line_rows(json_row)(file)  # type: ignore[attr-defined]


def _is_array(head: bytes) -> bool:
    return head.removeprefix(BOM).lstrip()[:1] == b"["


def _text_length(value: Any) -> int:
    """Number of characters in all strings of a nested value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_length, value.values()))
    return sum(map(_text_length, value)) if isinstance(value, list) else 0


def sequential_reader(parse: RowParser) -> FileReader:
    """Builds a reader for files that one process reads in order."""

    def rows(path: Path) -> Iterator[tuple[int, Any, float]]:
        """Yields (number, row, fraction of the file that is read)."""
        size = max(1, path.stat().st_size)
        compressed = path.suffix.lower() == ".gz"
        try:
            with (
                path.open("rb") as raw,
                gzip.GzipFile(fileobj=raw) if compressed else nullcontext(raw) as file,
            ):
                for number, row in parse(file):  # type: ignore[arg-type]
                    yield number, row, raw.tell() / size
        except (ValueError, EOFError, OSError, zlib.error, csv.Error) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def columns(path: Path) -> list[str]:
        return column_names(row for _, row, _ in islice(rows(path), 1000))

    def shards(path: Path, needed: Sequence[str]) -> Iterator[Shard]:
        collected: list[tuple[int, Any]] = []
        size = 0
        begin = 0.0
        for number, row, end in rows(path):
            selected = select_columns(row, needed) if isinstance(row, dict) else row
            collected.append((number, selected))
            size += ROW_OVERHEAD + _text_length(selected)
            if size >= SHARD_BYTES:
                yield Shard(path, rows=rows_to_batch(collected, needed), weight=end - begin)
                collected, size, begin = [], 0, end
        if collected:
            yield Shard(path, rows=rows_to_batch(collected, needed), weight=1 - begin)

    def read(shard: Shard, needed: Sequence[str]) -> Iterator[RowBatch]:
        return split_batch(shard.rows or RowBatch())

    return FileReader(columns, shards, read, lambda path, number: f"row {number}")


CSV = sequential_reader(csv_rows)
GZ_JSON = sequential_reader(json_rows)
GZ_TEXT = sequential_reader(line_rows(text_row))
JSON_ARRAY = sequential_reader(numbered_array)


def _json_reader(path: Path) -> FileReader:
    with path.open("rb") as file:
        return JSON_ARRAY if _is_array(file.read(1 << 12)) else JSONL


JSON = FileReader(
    lambda path: _json_reader(path).columns(path),
    lambda path, needed: _json_reader(path).shards(path, needed),
    lambda shard, needed: (JSONL if shard.rows is None else JSON_ARRAY).read(shard, needed),
    lambda path, location: _json_reader(path).describe_location(path, location),
)
"""Reads an array, or lines, which processes read in parallel."""
