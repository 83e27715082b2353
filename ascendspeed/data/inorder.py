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

from ascendspeed.data.lines import BOM, JSONL, json_row, text_row
from ascendspeed.data.shard import SHARD_BYTES, Bad, Format, Shard, batch_of, columns_of, slices
from ascendspeed.errors import UserError

Reader = Callable[[BinaryIO], Iterator[Any]]


def csv_rows(file: BinaryIO) -> Iterator[Any]:
    """Rows of a csv file with a header."""
    csv.field_size_limit(sys.maxsize)
    return iter(csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")))


def line_rows(parse: Callable[[bytes], Any]) -> Reader:
    """Lines, each read by `parse`."""

    def rows(file: BinaryIO) -> Iterator[Any]:
        parsed = (parse(line.removeprefix(BOM) if number == 0 else line) for number, line in enumerate(file))
        return (row for row in parsed if row is not None)

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
            yield row if isinstance(row, dict) else Bad.MALFORMED
        step = max(step, 2 * (len(rest) - at))  # doubling keeps a huge element from being parsed too often
    if rest[at:] or last != "]":
        raise ValueError(f"the array does not end, or no JSON value begins at {rest[at : at + 40]!r}")


def json_rows(file: BinaryIO) -> Iterator[Any]:
    """A JSON array or lines of objects: both are called .json."""
    return array_rows(file) if _is_array(file.peek(1 << 12)) else line_rows(json_row)(file)  # type: ignore[attr-defined]


def _is_array(head: bytes) -> bool:
    return head.removeprefix(BOM).lstrip()[:1] == b"["


def in_order(reader: Reader) -> Format:
    """A format that is read by one process."""

    def rows(path: Path) -> Iterator[tuple[Any, float]]:
        """Every row, with how far into the file it lies."""
        size = max(1, path.stat().st_size)
        try:
            packed = path.suffix.lower() == ".gz"
            with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if packed else nullcontext(raw) as file:
                for row in reader(file):  # type: ignore[arg-type]
                    yield row, raw.tell() / size
        except (ValueError, EOFError, OSError, zlib.error, csv.Error) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def columns(path: Path) -> list[str]:
        return columns_of(row for row, _ in islice(rows(path), 1000))

    def shards(path: Path, wanted: Sequence[str]) -> Iterator[Shard]:
        held: list[Any] = []
        size, before = 0, 0.0
        for row, at in rows(path):
            kept = {name: row.get(name) for name in wanted} if isinstance(row, dict) else row
            held.append(kept)
            size += 64 + sum(len(v) for v in kept.values() if isinstance(v, str)) if isinstance(kept, dict) else 64
            if size >= SHARD_BYTES:
                yield Shard(path, held=batch_of(held, wanted), weight=at - before)
                held, size, before = [], 0, at
        if held:
            yield Shard(path, held=batch_of(held, wanted), weight=1 - before)

    return Format(columns, shards, lambda shard, wanted: slices(shard.held or {}))


CSV, GZ_JSON, GZ_TEXT, JSON_ARRAY = in_order(csv_rows), in_order(json_rows), in_order(line_rows(text_row)), in_order(array_rows)


def _json(path: Path) -> Format:
    with path.open("rb") as file:
        return JSON_ARRAY if _is_array(file.read(1 << 12)) else JSONL


JSON = Format(
    lambda path: _json(path).columns(path),
    lambda path, wanted: _json(path).shards(path, wanted),
    lambda shard, wanted: (JSONL if shard.held is None else JSON_ARRAY).read(shard, wanted),
)
"""An array, or lines, which then are read side by side."""
