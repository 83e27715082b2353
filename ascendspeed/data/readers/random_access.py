"""Rows that can be read at any place, in any order: what data are streamed from.

Lines (jsonl, txt) are read where they lie, by an index of their beginnings. All else goes through the `datasets` library: what
`save_to_disk` wrote and arrow files as they lie, parquet, json and csv by way of the arrow files that it keeps in its cache.
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
"""Files of a folder that `save_to_disk` wrote."""
ROWS_FOR_COLUMNS = 1000
"""Rows that are looked at for the names of columns."""


class Table(ABC):
    """Rows by number."""

    columns: Sequence[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, numbers: np.ndarray, wanted: Sequence[str]) -> RowBatch:
        """The rows `numbers` [n] with exactly the columns `wanted`; blank lines are left out. Places are the rows' numbers."""

    @abstractmethod
    def where(self, number: int) -> str:
        """The place of a row in words."""


class LineTable(Table):
    """Lines of jsonl and txt files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        begins = [_beginnings(path) for path in self._files]
        self._begins = [
            np.append(found, path.stat().st_size) for found, path in zip(begins, self._files, strict=True)
        ]
        self._first = np.cumsum([0, *map(len, begins)])
        self._parse = text_row if self._files[0].suffix == ".txt" else json_row
        rows = (self._row(number) for number in range(min(ROWS_FOR_COLUMNS, len(self))))
        self.columns = column_names(row for row in rows if row is not None)

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, numbers: np.ndarray, wanted: Sequence[str]) -> RowBatch:
        rows = ((int(number), self._row(int(number))) for number in numbers)
        return rows_to_batch([(number, row) for number, row in rows if row is not None], wanted)

    def where(self, number: int) -> str:
        which, line = self._place(number)
        return f"{self._files[which]}, line {line + 1}"

    def _place(self, number: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        return which, number - int(self._first[which])

    def _row(self, number: int) -> Any:
        which, line = self._place(number)
        start, stop = self._begins[which][line : line + 2].tolist()
        with self._files[which].open("rb") as file:
            file.seek(start)
            read = file.read(stop - start)
        return self._parse(read.removeprefix(BOM) if not start else read)


def _beginnings(path: Path) -> np.ndarray:
    """Where each line begins, [lines] int64."""
    found, at, size = [np.zeros(1, np.int64)], 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at + 1)
            at += len(chunk)
    begins = np.concatenate(found)
    return begins[begins < size]


class ArrowTable(Table):
    """A data set of the `datasets` library."""

    def __init__(self, path: str, data: Any) -> None:
        self._path, self._data = path, data.with_format("arrow")
        self._selected: dict[tuple[str, ...], Any] = {}
        self.columns = list(data.column_names)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, numbers: np.ndarray, wanted: Sequence[str]) -> RowBatch:
        present = tuple(name for name in wanted if name in self.columns)
        if present not in self._selected:
            self._selected[present] = self._data.select_columns(list(present))
        table = self._selected[present][numbers.tolist()] if present else None
        there, asked = tuple(self.columns), tuple(wanted)

        def column(name: str) -> list[Any]:
            return (
                to_python(table[name])
                if name in present
                else [missing_value(name, there, asked)] * len(numbers)
            )

        return RowBatch.at(numbers.tolist(), {name: column(name) for name in wanted})

    def where(self, number: int) -> str:
        return f"{self._path}, row {number + 1}"


def open_table(path: str, files: Sequence[Path], cache: Path | None) -> Table:
    """The rows of `files`, all of one kind. `cache`: where arrow files are kept; None: where the library does.

    Raises `UserError` for damaged files, and where the library is needed and not installed.
    """
    try:
        if all(map(_holds_lines, files)):
            return LineTable(files)
        return ArrowTable(path, _data_set(path, files, cache))
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _holds_lines(file: Path) -> bool:
    if file.suffix == ".json":  # an array, or lines
        with file.open("rb") as stream:
            return stream.read(1 << 12).removeprefix(BOM).lstrip()[:1] != b"["
    return file.suffix in (".jsonl", ".txt")


def _data_set(path: str, files: Sequence[Path], cache: Path | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading it takes the package datasets: pip install -e '.[streaming]'"
        ) from error
    datasets.disable_progress_bars()
    names, kept = [str(file) for file in files], {"cache_dir": str(cache)} if cache else {}
    try:
        if (files[0].parent / SAVED_FILES[0]).is_file():
            return datasets.load_from_disk(str(files[0].parent))
        if files[0].suffix == ".arrow":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])
        read = {
            ".parquet": datasets.Dataset.from_parquet,
            ".csv": datasets.Dataset.from_csv,
            ".json": datasets.Dataset.from_json,
        }
        return read[files[0].suffix](names, **kept)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library and Arrow raise all kinds
        cause = error.__cause__ or error
        raise UserError(
            f"{path} cannot be read as a data set: {first_line(cause)}; tools/preprocess_data.py counts bad rows instead"
        ) from error


def fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file does: names, sizes and times."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
