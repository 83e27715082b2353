"""Lines of jsonl and txt: a shard is a range of bytes and owns the lines that begin in it."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

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

CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"


def json_row(line: bytes) -> Any:
    """The object of a line, `Bad.MALFORMED` if it is none, None for a blank line."""
    if not line.strip():
        return None
    try:
        row = json.loads(decode(line))
    except (ValueError, RecursionError):
        return InvalidValue.MALFORMED
    return row if isinstance(row, dict) else InvalidValue.MALFORMED


def text_row(line: bytes) -> Any:
    """A line of plain text is a document of its own."""
    return {"text": decode(line.rstrip(b"\r\n"))}


def _lines(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line)."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # begins in the shard before, or is the last byte of it
        elif file.read(len(BOM)) != BOM:
            file.seek(0)
        at = file.tell()
        while at < stop and (line := file.readline()):
            yield at, line
            at += len(line)


def _shards(path: Path, wanted: Sequence[str]) -> Iterator[Shard]:
    size = path.stat().st_size
    for start, stop in split_evenly(size, max(1, -(-size // SHARD_BYTES))):
        yield Shard(path, start, stop, weight=(stop - start) / size)


def _where(path: Path, offset: int) -> str:
    """Lines are counted when there is something to say about one."""
    with path.open("rb") as file:
        before = sum(file.read(min(CHUNK, offset - at)).count(b"\n") for at in range(0, offset, CHUNK))
    return f"line {before + 1}"


def _grouped(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while group := list(islice(rows, BATCH_ROWS)):
        yield group


def line_reader(parse: Callable[[bytes], Any]) -> FileReader:
    """A format of lines, each read by `parse`."""

    def rows(path: Path, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        parsed = ((at, parse(line)) for at, line in _lines(path, start, stop))
        return ((at, row) for at, row in parsed if row is not None)

    def columns(path: Path) -> list[str]:
        return column_names(row for _, row in islice(rows(path, 0, path.stat().st_size), 1000))

    def read(shard: Shard, wanted: Sequence[str]) -> Iterator[RowBatch]:
        for group in _grouped(rows(shard.path, shard.start, shard.stop)):
            yield rows_to_batch(group, wanted)

    return FileReader(columns, _shards, read, _where)


JSONL, TXT = line_reader(json_row), line_reader(text_row)
