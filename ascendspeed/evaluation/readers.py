"""Strict readers of CSV, JSON-lines and parquet files: rows with file and line, cells as text (`0.50`,
`None`, `NA`).
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ascendspeed.data.readers.csv_text import CsvError, strict_rows
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import (
    HEAD_BYTES,
    checked_file,
    checked_text,
    parse_json,
    refuse_lfs_pointer,
    refuse_utf16,
)
from ascendspeed.utils.text import first_line, shorten

TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")


def csv_rows(
    path: Path, names: Sequence[str] | None = None, width: int = 0
) -> Iterator[tuple[str, list[str]]]:
    """Yields (file and line, cells) of a CSV file.

    With `names`, the file has a header and these columns are read; otherwise it has none and exactly `width`
    columns. Raises UserError with file and line for a row that is too short or too long and for unclosed
    quotes.
    """
    columns = None
    for location, row in _csv_lines(path):
        if names is not None and columns is None:
            missing = [name for name in names if name not in row]
            if missing:
                raise UserError(
                    f"{location}: the first line must name the columns, but lacks {', '.join(missing)}: "
                    f"{shorten(','.join(row))}"
                )
            repeated = next((name for name in names if row.count(name) > 1), None)
            if repeated:
                raise UserError(f"{location}: the column {repeated!r} occurs {row.count(repeated)} times")
            columns, width = [row.index(name) for name in names], len(row)
        elif len(row) != width:
            raise UserError(
                f"{location}: {len(row)} fields, not {width}; a field with commas must be in quotes"
            )
        else:
            yield location, row if columns is None else [row[i] for i in columns]
    if names is not None and columns is None:
        raise UserError(f"{path} is empty")


def _csv_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        with open(checked_text(path), encoding="utf-8-sig", newline="") as file:
            for line, _, row in strict_rows(file):
                if any("\0" in cell for cell in row):
                    raise UserError(f"{path}:{line}: a cell holds NUL characters; the file is damaged")
                yield f"{path}:{line}", row
    except CsvError as error:
        raise UserError(f"{path}:{error.line}: this is not CSV: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and line, object) of a JSON-lines file, which may begin with a byte order mark.

    Raises UserError with file and line.
    """
    try:
        with open(checked_text(path), "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                location = f"{path}:{number}"
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise UserError(f"{location}: this line is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{location}: this line is not a JSON object")
                yield location, row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parquet_rows(paths: Sequence[Path], names: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yields (file and row, cells of the columns `names`) of all shards of a split.

    Raises UserError if one is missing.
    """
    for location, row in parquet_objects(paths, names):
        yield location, [row[name] for name in names]


def parquet_objects(
    paths: Sequence[Path], names: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and row, column -> cell) of all shards of a split.

    `names`: the columns to read; None: all. Raises UserError if a shard or a column is missing.
    """
    import pyarrow
    import pyarrow.parquet

    _check_shards(paths)
    for path in paths:
        try:
            table = pyarrow.parquet.ParquetFile(checked_file(path))
            present = table.schema_arrow.names
            missing = [name for name in names or () if name not in present]
            if missing:
                raise UserError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(present)}")
            repeated = [name for name in names or present if present.count(name) > 1]
            if repeated:
                raise UserError(f"{path}: the column {repeated[0]!r} occurs twice")
            rows = table.read(columns=None if names is None else list(names)).to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: not UTF-8
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
        for number, row in enumerate(rows):
            yield f"{path}: row {number}", row


def check_dataset_files(folder: Path) -> None:
    """Raises UserError for Git LFS pointers and UTF-16 below `folder`, which `datasets` would call invalid
    without their name.
    """
    for path in sorted(folder.rglob("*")):
        is_text = path.suffix in TEXT_SUFFIXES
        if (is_text or path.suffix == ".parquet") and path.is_file():
            with open(path, "rb") as file:
                head = file.read(HEAD_BYTES)
            refuse_lfs_pointer(path, head)
            if is_text:
                refuse_utf16(path, head)


def _check_shards(paths: Sequence[Path]) -> None:
    for path in paths:
        match = re.search(r"-(\d+)-of-(\d+)\.parquet$", path.name)
        if match and int(match[2]) != len(paths):
            raise UserError(f"{path} is one of {int(match[2])} files, but {len(paths)} are there")


def string_field(location: str, row: dict[str, Any], key: str) -> str:
    """Returns a string of a JSON object. Raises UserError if it is missing or of another type."""
    value = row.get(key)
    if not isinstance(value, str):
        problem = "missing" if key not in row else shorten(value)
        raise UserError(f"{location}: {key!r} is {problem}, where a string should be")
    return value
