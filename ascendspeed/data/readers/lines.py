"""Reads lines of jsonl and txt files: a shard is a range of bytes and owns the lines that begin in it."""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ascendspeed.data.readers.json_text import (
    RepeatedKey,
    malformed,
    not_an_object,
    repeated_key,
    unique_keys,
)
from ascendspeed.data.readers.shard import (
    BATCH_ROWS,
    SHARD_BYTES,
    FileReader,
    InvalidValue,
    RowBatch,
    Shard,
    column_names,
    decode,
    rows_to_batch,
    split_evenly,
)
from ascendspeed.utils.text import first_line

CHUNK = 1 << 20
BOM = codecs.BOM_UTF8
NUL = InvalidValue("NUL characters", "NUL bytes: a damaged disk or copy, or text that is not UTF-8")
_decoder = json.JSONDecoder(object_pairs_hook=unique_keys)


def json_row(line: bytes) -> Any:
    """Parses a line; returns an `InvalidValue` if it is not a JSON object, None if it is blank."""
    if not line.strip():
        return None
    try:
        row = _decoder.decode(decode(line))
    except RepeatedKey as error:
        return repeated_key(str(error))
    except RecursionError:
        return malformed("nested too deeply")
    except json.JSONDecodeError as error:
        return NUL if b"\0" in line else malformed(f"{error.msg}, column {error.colno}")
    except ValueError as error:  # an integer of more digits than Python converts
        return malformed(first_line(error))
    return row if isinstance(row, dict) else not_an_object(row)


def text_row(line: bytes) -> Any:
    """Returns a line of plain text as a row of its own."""
    return NUL if b"\0" in line else {"text": decode(line.rstrip(b"\r\n"))}


def _lines(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line) for the lines that begin in [start, stop)."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # begins in the previous shard, or is its last byte
        elif file.read(len(BOM)) != BOM:
            file.seek(0)
        offset = file.tell()
        while offset < stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _shards(path: Path, needed: Sequence[str]) -> Iterator[Shard]:
    size = path.stat().st_size
    for start, stop in split_evenly(size, max(1, -(-size // SHARD_BYTES))):
        yield Shard(path, start, stop, weight=(stop - start) / size)


def _describe_location(path: Path, offset: int) -> str:
    """Counts the lines before `offset`, which is only needed for a message."""
    lines = 0
    with path.open("rb") as file:
        for start in range(0, offset, CHUNK):
            lines += file.read(min(CHUNK, offset - start)).count(b"\n")
    return f"line {lines + 1}"


def _groups(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while group := list(islice(rows, BATCH_ROWS)):
        yield group


def line_reader(parse: Callable[[bytes], Any]) -> FileReader:
    """Builds a reader for files of lines, each parsed by `parse`."""

    def rows(path: Path, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        for offset, line in _lines(path, start, stop):
            row = parse(line)
            if row is not None:
                yield offset, row

    def columns(path: Path) -> list[str]:
        return column_names(row for _, row in islice(rows(path, 0, path.stat().st_size), 1000))

    def read(shard: Shard, needed: Sequence[str]) -> Iterator[RowBatch]:
        for group in _groups(rows(shard.path, shard.start, shard.stop)):
            yield rows_to_batch(group, needed)

    return FileReader(columns, _shards, read, _describe_location)


JSONL = line_reader(json_row)
TXT = line_reader(text_row)
