"""What can only be read from its beginning (json arrays, csv, .gz): it is read in order, and the shards carry their rows."""

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
"""Rows and their numbers, from 1 on."""
RowParser = Callable[[BinaryIO], NumberedRows]


def csv_rows(file: BinaryIO) -> NumberedRows:
    """Rows of a csv file with a header, which is none; one with more or fewer cells is `Bad`: which is which cannot be known."""
    csv.field_size_limit(sys.maxsize)
    found = (
        cells
        for cells in csv.reader(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""))
        if cells
    )
    header = next(found, [])
    return enumerate((_csv_row(header, cells) for cells in found), 1)


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return InvalidValue("wrong number of cells", f"{len(cells)} cells, the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def line_rows(parse: Callable[[bytes], Any]) -> RowParser:
    """Lines, each read by `parse`."""

    def rows(file: BinaryIO) -> NumberedRows:
        parsed = (
            (number, parse(line.removeprefix(BOM) if number == 1 else line))
            for number, line in enumerate(file, 1)
        )
        return ((number, row) for number, row in parsed if row is not None)

    return rows


def array_rows(file: BinaryIO) -> Iterator[Any]:
    """Elements of a JSON array, one at a time. Raises `ValueError` where the text is damaged."""
    text, decoder = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape"), json.JSONDecoder()
    rest, at, last, step = "", 0, "", 1 << 16
    while more := text.read(step):
        rest, at = rest[at:] + more, 0
        while True:
            while at < len(rest) and rest[at] in "[], \t\r\n":  # between elements, which are objects
                last, at = rest[at].strip() or last, at + 1
            try:
                row, at = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError):
                break  # the rest of this element is not read yet, or the file is damaged: then it never comes
            last = ""
            yield row if isinstance(row, dict) else InvalidValue.MALFORMED
        step = max(step, 2 * (len(rest) - at))  # doubling keeps a huge element from being parsed too often
    if rest[at:] or last != "]":
        raise ValueError(f"the array does not end, or no JSON value begins at {rest[at : at + 40]!r}")


def numbered_array(file: BinaryIO) -> NumberedRows:
    """The same with numbers."""
    return enumerate(array_rows(file), 1)


def json_rows(file: BinaryIO) -> NumberedRows:
    """A JSON array or lines of objects: both are called .json."""
    return numbered_array(file) if _is_array(file.peek(1 << 12)) else line_rows(json_row)(file)  # type: ignore[attr-defined]


def _is_array(head: bytes) -> bool:
    return head.removeprefix(BOM).lstrip()[:1] == b"["


def _size(value: Any) -> int:
    """Characters of all text in it."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, parts))


def _where(path: Path, number: int) -> str:
    return f"row {number}"


def sequential_reader(reader: RowParser) -> FileReader:
    """A format that is read by one process."""

    def rows(path: Path) -> Iterator[tuple[int, Any, float]]:
        """Every row and its number, with how far into the file it lies."""
        size = max(1, path.stat().st_size)
        try:
            packed = path.suffix.lower() == ".gz"
            with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if packed else nullcontext(raw) as file:
                for number, row in reader(file):  # type: ignore[arg-type]
                    yield number, row, raw.tell() / size
        except (ValueError, EOFError, OSError, zlib.error, csv.Error) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def columns(path: Path) -> list[str]:
        return column_names(row for _, row, _ in islice(rows(path), 1000))

    def shards(path: Path, wanted: Sequence[str]) -> Iterator[Shard]:
        held: list[tuple[int, Any]] = []
        size, before = 0, 0.0
        for number, row, at in rows(path):
            kept = select_columns(row, wanted) if isinstance(row, dict) else row
            held.append((number, kept))
            size += 64 + _size(kept)
            if size >= SHARD_BYTES:
                yield Shard(path, held=rows_to_batch(held, wanted), weight=at - before)
                held, size, before = [], 0, at
        if held:
            yield Shard(path, held=rows_to_batch(held, wanted), weight=1 - before)

    return FileReader(columns, shards, lambda shard, wanted: split_batch(shard.held or RowBatch()), _where)


CSV, GZ_JSON, GZ_TEXT, JSON_ARRAY = (
    sequential_reader(csv_rows),
    sequential_reader(json_rows),
    sequential_reader(line_rows(text_row)),
    sequential_reader(numbered_array),
)


def _json(path: Path) -> FileReader:
    with path.open("rb") as file:
        return JSON_ARRAY if _is_array(file.read(1 << 12)) else JSONL


JSON = FileReader(
    lambda path: _json(path).columns(path),
    lambda path, wanted: _json(path).shards(path, wanted),
    lambda shard, wanted: (JSONL if shard.held is None else JSON_ARRAY).read(shard, wanted),
    lambda path, place: _json(path).where(path, place),
)
"""An array, or lines, which then are read side by side."""
