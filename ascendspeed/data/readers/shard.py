"""What rows are read in: batches of columns, and shards of files that processes work on side by side."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

SHARD_BYTES = 8 << 20
"""Text of one shard: a second or two of tokenizing."""
BATCH_ROWS = 512


class RowBatch(dict[str, list[Any]]):
    """Columns of equal length."""

    places: Sequence[int] = ()
    """Where in its file each row lies, for messages; what the number means, the format knows."""

    @classmethod
    def at(cls, places: Sequence[int], columns: dict[str, list[Any]]) -> Self:
        """The same with places."""
        batch = cls(columns)
        batch.places = places
        return batch


@dataclass(frozen=True)
class InvalidValue:
    """Stands in place of a value that could not be read."""

    kind: str
    """What it is counted under."""
    detail: str = ""
    """What is wrong with this one."""

    MALFORMED: ClassVar["InvalidValue"]
    NOT_UTF8: ClassVar["InvalidValue"]


InvalidValue.MALFORMED = InvalidValue("malformed", "not a JSON object")
InvalidValue.NOT_UTF8 = InvalidValue("invalid UTF-8")
MISSPELLED = "misspelt column"
SIMILARITY = 0.8
"""Of difflib's ratio, from where on a name is a misspelt one: `inputs` is at 0.91 from `input`, `output` at 0.55."""


@dataclass(frozen=True)
class Shard:
    """A run of rows of one file: bytes [start, stop) of lines, rows [start, stop) of a row group, or the rows themselves."""

    path: Path
    start: int = 0
    stop: int = 0
    group: int = 0
    """Parquet row group."""
    held: RowBatch | None = None
    weight: float = 0
    """Share of the file that this is, for progress."""


@dataclass(frozen=True)
class FileReader:
    """How one kind of file is read. `wanted` are the columns that are needed; a batch has exactly these."""

    columns: Callable[[Path], list[str]]
    """Names of what its rows hold (of json: the keys of the first thousand); nothing for a file without rows."""
    shards: Callable[[Path, Sequence[str]], Iterator[Shard]]
    """The file in order, cut by its content alone."""
    read: Callable[[Shard, Sequence[str]], Iterator[RowBatch]]
    """The rows of a shard."""
    where: Callable[[Path, int], str]
    """The place of a row in words: line 7."""


def split_evenly(size: int, parts: int) -> list[tuple[int, int]]:
    """[0, size) in at most `parts` ranges that are not empty."""
    edges = [size * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def decode(raw: bytes) -> str:
    """Text; bytes that are not UTF-8 become lone surrogates, which no tokenizer accepts and `screen` counts."""
    return raw.decode("utf-8", "surrogateescape")


def column_names(rows: Iterable[Any]) -> list[str]:
    """Keys of rows, of those that are objects, in the order in which they come up."""
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def rows_to_batch(rows: Sequence[tuple[int, Any]], wanted: Sequence[str]) -> RowBatch:
    """Places and rows -> columns; a missing key is as `absent` says, a row that is not an object is itself in every column."""
    picked = [
        select_columns(row, wanted) if isinstance(row, dict) else dict.fromkeys(wanted, row)
        for _, row in rows
    ]
    return RowBatch.at([place for place, _ in rows], {name: [row[name] for row in picked] for name in wanted})


def select_columns(row: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """What is wanted of a row."""
    keys, names = tuple(row), tuple(wanted)
    return {name: row[name] if name in row else missing_value(name, keys, names) for name in wanted}


@lru_cache(1 << 12)
def missing_value(name: str, present: tuple[str, ...], wanted: tuple[str, ...]) -> InvalidValue | None:
    """What stands where the column `name` is not among those `present`: None, or `Bad` where one that nobody wants is much like it,
    as its values would be lost without a word."""
    unread = {str(other).casefold().strip(): other for other in present if other not in wanted}
    near = difflib.get_close_matches(name.casefold(), unread, 1, SIMILARITY)
    return (
        InvalidValue(MISSPELLED, f"{unread[near[0]]!r} is not read; did you mean {name!r}?") if near else None
    )


def split_batch(rows: RowBatch) -> Iterator[RowBatch]:
    """A large batch in batches of at most `BATCH_ROWS`."""
    count = len(next(iter(rows.values()), []))
    for start in range(0, count, BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        yield RowBatch.at(rows.places[part], {name: values[part] for name, values in rows.items()})
