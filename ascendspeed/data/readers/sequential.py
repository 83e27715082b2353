"""Reads files that have no random access (csv, JSON arrays, compressed files) in order; their shards
carry the rows."""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ascendspeed.data.readers import json_text
from ascendspeed.data.readers.compression import DAMAGED, compression_of, open_text, read_head
from ascendspeed.data.readers.csv_text import CsvError, strict_rows
from ascendspeed.data.readers.json_text import Layout
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
from ascendspeed.utils.safe_io import HEAD_BYTES
from ascendspeed.utils.text import first_line

logger = logging.getLogger(__name__)

NumberedRows = Iterator[tuple[int, Any]]
"""Rows with their locations: numbers of lines or rows, from 1."""
RowParser = Callable[[Path, IO[bytes]], NumberedRows]
"""(path, for messages; its decompressed content) -> rows."""
MAX_FIRST_LINE = 16 << 20
"""Bytes of the first line that are read to recognise a layout."""
ROW_OVERHEAD = 64
"""Bytes that every row counts for, beside its text."""


def csv_rows(delimiter: str) -> RowParser:
    """Builds a parser of csv with a header; a row with more or fewer cells than the header is invalid,
    because cells cannot be assigned."""

    def rows(path: Path, file: IO[bytes]) -> NumberedRows:
        lines = strict_rows(_csv_text(file), delimiter)
        header = next((cells for _, _, cells in lines), [])
        count = over_lines = longest = longest_line = 0
        for first, last, cells in lines:
            count += 1
            over_lines += last > first
            if last - first > longest:
                longest, longest_line = last - first, first
            yield first, _csv_row(header, cells)
        if over_lines:
            logger.info(
                f"note: {path}: {over_lines:,} of {count:,} rows hold line breaks in quotes; the longest, at "
                f"line {longest_line:,}, takes {longest + 1:,} lines"
            )

    return rows


def _csv_text(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        detail = f"{len(cells)} cells, the header has {len(header)}"
        return InvalidValue("wrong number of cells", detail)
    return dict(zip(header, cells, strict=True))


def line_rows(parse: Callable[[bytes], Any]) -> RowParser:
    """Builds a parser for files of lines, each parsed by `parse`."""

    def rows(path: Path, file: IO[bytes]) -> NumberedRows:
        for number, line in enumerate(file, 1):
            row = parse(line.removeprefix(BOM) if number == 1 else line)
            if row is not None:
                yield number, row

    return rows


def json_rows(layout: Layout) -> RowParser:
    """Builds a parser of JSON in a layout."""
    if layout is Layout.LINES:
        return line_rows(json_row)
    return lambda path, file: enumerate(json_text.rows(file, layout), 1)


def _text_length(value: Any) -> int:
    """Number of characters in all strings of a nested value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_length, value.values()))
    return sum(map(_text_length, value)) if isinstance(value, list) else 0


def sequential_rows(path: Path, parse: RowParser) -> Iterator[tuple[int, Any, float]]:
    """Yields (location, row, fraction of the file that is read). Raises `UserError` for a damaged file."""
    try:
        size = max(1, path.stat().st_size)
        with open_text(path) as (file, raw):
            for location, row in parse(path, file):
                yield location, row, raw.tell() / size
    except CsvError as error:
        raise UserError(f"{path}, line {error.line}: {error}") from error
    except (ValueError, *DAMAGED) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error


def sequential_reader(
    parse: RowParser, columns: Callable[[Path], list[str]] | None = None, unit: str = "line"
) -> FileReader:
    """Builds a reader for files that one process reads in order.

    `columns`: by default the keys of the first rows; `unit`: what the parser counts.
    """

    def rows(path: Path) -> Iterator[tuple[int, Any, float]]:
        return sequential_rows(path, parse)

    def first_columns(path: Path) -> list[str]:
        return column_names(row for _, row, _ in islice(rows(path), 1000))

    def shards(path: Path, needed: Sequence[str]) -> Iterator[Shard]:
        collected: list[tuple[int, Any]] = []
        size = 0
        begin = 0.0
        for location, row, end in rows(path):
            selected = select_columns(row, needed) if isinstance(row, dict) else row
            collected.append((location, selected))
            size += ROW_OVERHEAD + _text_length(selected)
            if size >= SHARD_BYTES:
                yield Shard(path, rows=rows_to_batch(collected, needed), weight=end - begin)
                collected, size, begin = [], 0, end
        if collected:
            yield Shard(path, rows=rows_to_batch(collected, needed), weight=1 - begin)

    def read(shard: Shard, needed: Sequence[str]) -> Iterator[RowBatch]:
        return split_batch(shard.rows or RowBatch())

    def describe_location(path: Path, number: int) -> str:
        return f"{unit} {number}"

    return FileReader(columns or first_columns, shards, read, describe_location, rows)


def _csv_reader(delimiter: str) -> FileReader:
    def columns(path: Path) -> list[str]:
        def header(path: Path, file: IO[bytes]) -> NumberedRows:
            text = _csv_text(file)  # closes the file when it is deleted
            yield 1, next((cells for _, _, cells in strict_rows(text, delimiter)), [])

        return next(row for _, row, _ in sequential_rows(path, header))

    return sequential_reader(csv_rows(delimiter), columns)


CSV = _csv_reader(",")
TSV = _csv_reader("\t")
COMPRESSED_TXT = sequential_reader(line_rows(text_row))
COMPRESSED_JSON_LINES = sequential_reader(json_rows(Layout.LINES))
JSON_READERS = {
    layout: sequential_reader(json_rows(layout), unit="row")
    for layout in Layout
    if layout is not Layout.LINES
}
"""Readers of JSON that is not one object per line, compressed or not."""


def json_layout(path: Path) -> Layout:
    """Returns the layout of a JSON file. Raises `UserError` for a damaged file."""
    try:
        head = read_head(path)
        layout = json_text.recognise(head)
        if layout is Layout.WRAPPED and b"\n" not in head:  # or a long row whose first key is `data`
            with open_text(path) as (file, _):
                layout = json_text.recognise(file.readline(MAX_FIRST_LINE) + file.read(HEAD_BYTES))
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    return layout


def _json_reader(path: Path) -> FileReader:
    layout = json_layout(path)
    if layout is Layout.LINES:
        return COMPRESSED_JSON_LINES if compression_of(path) else JSONL
    return JSON_READERS[layout]


JSON = FileReader(
    lambda path: _json_reader(path).columns(path),
    lambda path, needed: _json_reader(path).shards(path, needed),
    lambda shard, needed: (JSONL if shard.rows is None else COMPRESSED_JSON_LINES).read(shard, needed),
    lambda path, location: _json_reader(path).describe_location(path, location),
    lambda path: _json_reader(path).rows(path),
)
"""Reads JSON in any layout; lines that are not compressed by processes in parallel."""
