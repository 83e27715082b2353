"""Types that readers share: batches of rows as columns, shards of files, and the interface of a file
reader."""

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
    """Rows of one file as columns of equal length."""

    locations: Sequence[int] = ()
    """Location of each row in its file, for messages; the file's reader defines its meaning."""

    @classmethod
    def with_locations(cls, locations: Sequence[int], columns: dict[str, list[Any]]) -> Self:
        """Builds a batch from columns and the locations of its rows."""
        batch = cls(columns)
        batch.locations = locations
        return batch


@dataclass(frozen=True)
class InvalidValue:
    """Placeholder for a value that could not be read."""

    kind: str
    """Category under which the row is counted."""
    detail: str = ""
    """Description of this value's error."""

    NOT_UTF8: ClassVar["InvalidValue"]


InvalidValue.NOT_UTF8 = InvalidValue("invalid UTF-8")
MISSPELLED = "misspelt column"
SIMILARITY = 0.8
"""Ratio of difflib from which on a name counts as misspelled: `inputs` is at 0.91 from `input`, `output` at
0.55."""


@dataclass(frozen=True)
class Shard:
    """A range of rows of one file: bytes [start, stop) of lines, rows [start, stop) of a row group, or the
    rows themselves."""

    path: Path
    start: int = 0
    stop: int = 0
    group: int = 0
    """Parquet row group."""
    rows: RowBatch | None = None
    """Rows of a file that can only be read from its beginning."""
    weight: float = 0
    """Fraction of the file, for progress."""


@dataclass(frozen=True)
class FileReader:
    """Functions that read one kind of file. `needed` are the needed columns; a batch has exactly these."""

    columns: Callable[[Path], list[str]]
    """(path) -> column names (of json, the keys of the first thousand rows); empty for a file without
    rows."""
    shards: Callable[[Path, Sequence[str]], Iterator[Shard]]
    """(path, needed) -> the file's shards in order; the split depends on the content of the file alone."""
    read: Callable[[Shard, Sequence[str]], Iterator[RowBatch]]
    """(shard, needed) -> rows of a shard."""
    describe_location: Callable[[Path, int], str]
    """(path, location) -> text such as `line 7`."""
    rows: Callable[[Path], Iterator[tuple[int, Any, float]] | None] = lambda path: None
    """(path) -> (location, row, fraction of the file that is read) of all rows, for a file that can only be
    read from its beginning; None for any other."""


def split_evenly(size: int, parts: int) -> list[tuple[int, int]]:
    """Splits [0, size) into at most `parts` non-empty ranges."""
    edges = [size * i // parts for i in range(parts + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


def decode(raw: bytes) -> str:
    """Decodes UTF-8; invalid bytes become lone surrogates, which `handlers.base.text_size` reports."""
    return raw.decode("utf-8", "surrogateescape")


def column_names(rows: Iterable[Any]) -> list[str]:
    """Returns the keys of those rows that are objects, in the order of their first occurrence."""
    return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def rows_to_batch(rows: Sequence[tuple[int, Any]], needed: Sequence[str]) -> RowBatch:
    """Converts (location, row) to columns.

    A missing key becomes `missing_value`; a row that is not an object is repeated in every column.
    """
    records = []
    for _, row in rows:
        is_object = isinstance(row, dict)
        records.append(select_columns(row, needed) if is_object else dict.fromkeys(needed, row))
    columns = {name: [record[name] for record in records] for name in needed}
    return RowBatch.with_locations([location for location, _ in rows], columns)


def select_columns(row: dict[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    """Returns the values of the columns `needed`."""
    keys, names = tuple(row), tuple(needed)
    return {name: row[name] if name in row else missing_value(name, keys, names) for name in needed}


@lru_cache(1 << 12)
def missing_value(name: str, present: tuple[str, ...], needed: tuple[str, ...]) -> InvalidValue | None:
    """Returns the value for the column `name`, which is not in `present`.

    It is None, or an `InvalidValue` if an unread column has a similar name, because its values would be lost
    silently.
    """
    unread = {str(other).casefold().strip(): other for other in present if other not in needed}
    similar = difflib.get_close_matches(name.casefold(), unread, 1, SIMILARITY)
    if not similar:
        return None
    return InvalidValue(MISSPELLED, f"{unread[similar[0]]!r} is not read; did you mean {name!r}?")


def split_batch(rows: RowBatch) -> Iterator[RowBatch]:
    """Yields a large batch in batches of at most `BATCH_ROWS`."""
    count = len(next(iter(rows.values()), []))
    for start in range(0, count, BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        columns = {name: values[part] for name, values in rows.items()}
        yield RowBatch.with_locations(rows.locations[part], columns)
