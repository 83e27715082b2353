"""Tables with random access to rows, for data that are tokenized in training.

Lines (jsonl, txt) are read in place by an index of their offsets. Everything else goes through the `datasets`
library: folders of `save_to_disk` and arrow files are read in place; parquet, json and csv are converted to
arrow files in its cache.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.data.readers.lines import BOM, json_row, text_row
from ascendspeed.data.readers.parquet import to_python
from ascendspeed.data.readers.shard import RowBatch, column_names, missing_value, rows_to_batch
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

CHUNK = 1 << 24
SAVED_FILES = ("state.json", "dataset_info.json")
"""Files in a folder of `save_to_disk`."""
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
    """Lines of jsonl and txt files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        offsets = [_line_offsets(path) for path in self._files]
        self._bounds = []
        for path, begins in zip(self._files, offsets, strict=True):
            self._bounds.append(np.append(begins, path.stat().st_size))
        self._first_row = np.cumsum([0, *map(len, offsets)])
        self._parse = text_row if self._files[0].suffix == ".txt" else json_row
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
        return f"{self._files[which]}, line {line + 1}"

    def _file_and_line(self, number: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._first_row, number, side="right")) - 1
        return which, number - int(self._first_row[which])

    def _row(self, number: int) -> Any:
        which, line = self._file_and_line(number)
        start, stop = self._bounds[which][line : line + 2].tolist()
        with self._files[which].open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        return self._parse(content.removeprefix(BOM) if not start else content)


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


def open_table(path: str, files: Sequence[Path], cache: Path | None) -> Table:
    """Opens `files`, all of one kind. `cache`: folder for arrow files; None: the library's default.

    Raises `UserError` for damaged files, and if the library is needed and not installed.
    """
    try:
        if all(map(_holds_lines, files)):
            return LineTable(files)
        return ArrowTable(path, _load_dataset(path, files, cache))
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _holds_lines(file: Path) -> bool:
    if file.suffix == ".json":  # an array, or lines
        with file.open("rb") as stream:
            return stream.read(1 << 12).removeprefix(BOM).lstrip()[:1] != b"["
    return file.suffix in (".jsonl", ".txt")


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
        if files[0].suffix == ".arrow":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])
        readers = {
            ".parquet": datasets.Dataset.from_parquet,
            ".csv": datasets.Dataset.from_csv,
            ".json": datasets.Dataset.from_json,
        }
        return readers[files[0].suffix](names, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library and Arrow raise all kinds
        cause = error.__cause__ or error
        raise UserError(
            f"{path} cannot be read as a data set: {first_line(cause)}; tools/preprocess_data.py counts bad "
            "rows instead"
        ) from error


def fingerprint(files: Sequence[Path]) -> str:
    """Hashes the names, sizes and times of files, so that it changes when a file does."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
