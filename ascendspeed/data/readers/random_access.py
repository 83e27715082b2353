"""Tables with random access to rows, for data that are tokenized in training.

Lines (jsonl, txt) are read in place by an index of their offsets; csv, JSON arrays and compressed files after
they have been copied to lines (`row_cache`). Parquet and arrow files go through the `datasets` library: arrow
files and folders of `save_to_disk` are read in place, parquet is converted to arrow files in its cache.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.data.readers import registry, row_cache
from ascendspeed.data.readers.lines import BOM, json_row, text_row
from ascendspeed.data.readers.parquet import to_python
from ascendspeed.data.readers.row_cache import cached_rows
from ascendspeed.data.readers.shard import RowBatch, column_names, missing_value, rows_to_batch
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

CHUNK = 1 << 24
SAVED_FILES = ("state.json", "dataset_info.json")
"""Files in a folder of `save_to_disk`."""
ARROW = ".arrow"
ROWS_FOR_COLUMNS = 1000
"""Rows from which the column names are taken."""


class Table(ABC):
    """Rows of a dataset, by number."""

    columns: Sequence[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, numbers: np.ndarray, needed: Sequence[str]) -> RowBatch:
        """Returns the rows `numbers` [n] with exactly the columns `needed`, without blank lines; locations
        are row numbers."""

    @abstractmethod
    def describe_location(self, number: int) -> str:
        """Describes the location of a row: file and line or row."""


class LineTable(Table):
    """Lines of text files, or of their copies in a cache."""

    def __init__(self, files: Sequence[Path], cache: Path | None = None) -> None:
        """`cache`: folder for copies of files that cannot be read in place."""
        self._paths = list(files)
        copies = [cached_rows(path, cache) if cache else None for path in files]
        self._cached = [copy is not None for copy in copies]
        self._parsers = [
            row_cache.parse if copy else text_row if registry.format_of(path) == ".txt" else json_row
            for path, copy in zip(files, copies, strict=True)
        ]
        self._files = [copy or path for path, copy in zip(files, copies, strict=True)]
        offsets = [_line_offsets(path) for path in self._files]
        self._bounds = []
        for path, begins in zip(self._files, offsets, strict=True):
            self._bounds.append(np.append(begins, path.stat().st_size))
        self._first_row = np.cumsum([0, *map(len, offsets)])
        rows = (self._row(number) for number in range(min(ROWS_FOR_COLUMNS, len(self))))
        self.columns = column_names(row for row in rows if row is not None)

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def read(self, numbers: np.ndarray, needed: Sequence[str]) -> RowBatch:
        rows = []
        for number in numbers.tolist():
            row = self._row(number)
            if row is not None:
                rows.append((number, row))
        return rows_to_batch(rows, needed)

    def describe_location(self, number: int) -> str:
        which, line = self._file_and_line(number)
        path = self._paths[which]
        if not self._cached[which]:
            return f"{path}, line {line + 1}"
        return f"{path}, {registry.describe_location(path, row_cache.location(self._line(which, line)))}"

    def _file_and_line(self, number: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._first_row, number, side="right")) - 1
        return which, number - int(self._first_row[which])

    def _line(self, which: int, line: int) -> bytes:
        start, stop = self._bounds[which][line : line + 2].tolist()
        with self._files[which].open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        return content.removeprefix(BOM) if not start else content

    def _row(self, number: int) -> Any:
        which, line = self._file_and_line(number)
        return self._parsers[which](self._line(which, line))


def _line_offsets(path: Path) -> np.ndarray:
    """Offset of each line, [lines] int64."""
    size = path.stat().st_size
    offsets = [np.zeros(1, np.int64)]
    position = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            newlines = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            offsets.append(newlines + position + 1)
            position += len(chunk)
    begins = np.concatenate(offsets)
    return begins[begins < size]


class ArrowTable(Table):
    """A dataset of the `datasets` library."""

    def __init__(self, path: str, data: Any) -> None:
        self._path = path
        self._data = data.with_format("arrow")
        self._selected: dict[tuple[str, ...], Any] = {}
        self.columns = list(data.column_names)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, numbers: np.ndarray, needed: Sequence[str]) -> RowBatch:
        present = tuple(name for name in needed if name in self.columns)
        if present not in self._selected:
            self._selected[present] = self._data.select_columns(list(present))
        table: Any = self._selected[present][numbers.tolist()] if present else None
        names = tuple(self.columns)
        columns = {}
        for name in needed:
            if name in present:
                columns[name] = to_python(table[name])
            else:
                columns[name] = [missing_value(name, names, tuple(needed))] * len(numbers)
        return RowBatch.with_locations(numbers.tolist(), columns)

    def describe_location(self, number: int) -> str:
        return f"{self._path}, row {number + 1}"


def open_table(path: str, files: Sequence[Path], rows_cache: Path, arrow_cache: Path | None) -> Table:
    """Opens `files`, all of one type.

    `rows_cache`: folder for copies of rows; `arrow_cache`: folder for arrow files; None: the library's own.

    Raises `UserError` for damaged files, and if the library is needed and not installed.
    """
    try:
        if _is_text(files[0]):
            return LineTable(files, rows_cache)
        return ArrowTable(path, _load_dataset(path, files, arrow_cache))
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _is_text(file: Path) -> bool:
    return registry.format_of(file) in registry.TEXT_READERS


def _load_dataset(path: str, files: Sequence[Path], cache: Path | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading it takes the package datasets: pip install -e '.[streaming]'"
        ) from error
    datasets.disable_progress_bars()
    names = [str(file) for file in files]
    options = {"cache_dir": str(cache)} if cache else {}
    try:
        if (files[0].parent / SAVED_FILES[0]).is_file():
            return datasets.load_from_disk(str(files[0].parent))
        if files[0].suffix == ARROW:
            return datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])
        return datasets.Dataset.from_parquet(names, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library and Arrow raise all kinds
        raise UserError(
            f"{path} cannot be read as a data set: {first_line(error.__cause__ or error)}"
        ) from error


def fingerprint(files: Sequence[Path]) -> str:
    """Hashes the names, sizes and times of files, so that it changes when a file does."""
    stats: list[object] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if _is_text(files[0]) and any(registry.reader_of(file).rows(file) is not None for file in files):
        stats.append(row_cache.VERSION)
    return hashlib.sha256(repr(stats).encode()).hexdigest()
