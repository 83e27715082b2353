"""Rows of CSV, JSON-lines and parquet files with the place of each, and nothing guessed: `0.50`, `None` and `NA` are text."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file, parse_json
from ascendspeed.utils.text import first_line

Row = tuple[str, Any]
"""(file and line, what stands there)."""


def csv_rows(
    path: Path, names: Sequence[str] | None = None, width: int = 0
) -> Iterator[tuple[str, list[str]]]:
    """Rows of a CSV file: with `names` the columns of these names in a headed file, else all `width` columns of a headless one.

    Raises `UserError` with file and line for a row that is too short or too long, and for quotes that are never closed.
    """
    columns = None
    for where, row in _csv(path):
        if names is not None and columns is None:
            missing = [name for name in names if name not in row]
            if missing:
                raise UserError(
                    f"{where}: the first line must name the columns, but lacks {', '.join(missing)}: {','.join(row)}"
                )
            columns, width = [row.index(name) for name in names], len(row)
        elif len(row) != width:
            raise UserError(
                f"{where}: {len(row)} fields, not {width}; a field that holds commas must stand in quotes"
            )
        else:
            yield where, row if columns is None else [row[i] for i in columns]
    if names is not None and columns is None:
        raise UserError(f"{path} is empty")


def _csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        with open(checked_file(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            line = 1
            for row in reader:
                if row:  # an empty line is none
                    yield f"{path}:{line}", row
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: this is not CSV: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tables of a file that has one in each line. Raises `UserError` with file and line."""
    try:
        with open(checked_file(path), "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise UserError(f"{where}: this line is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where}: this line is not a table of names and values")
                yield where, row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parquet_rows(paths: Sequence[Path], names: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Columns `names` of parquet files, which are the shards of one split and must be all there. Raises `UserError`."""
    import pyarrow
    import pyarrow.parquet

    _check_shards(paths)
    for path in paths:
        try:
            table = pyarrow.parquet.ParquetFile(checked_file(path))
            missing = [name for name in names if name not in table.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(table.schema_arrow.names)}"
                )
            rows = table.read(columns=list(names)).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
        yield from (
            (f"{path}: row {number}", [row[name] for name in names]) for number, row in enumerate(rows)
        )


def _check_shards(paths: Sequence[Path]) -> None:
    for path in paths:
        match = re.search(r"-(\d+)-of-(\d+)\.parquet$", path.name)
        if match and int(match[2]) != len(paths):
            raise UserError(f"{path} is one of {int(match[2])} files, but {len(paths)} are there")


def text_of(where: str, row: dict[str, Any], key: str) -> str:
    """A string of a table. Raises `UserError`."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {key!r} is {'missing' if key not in row else repr(value)}, where a string should be"
        )
    return value
