"""Reads CSV strictly: a quote that is never closed, or text behind a closed quote, is an error with its line,
because the rows behind it would be lost."""

import csv
from collections.abc import Iterable, Iterator

MAX_CELL = 256 << 20
"""Characters of the longest cell: an open quote must not fill the memory with the rest of a large file."""


class CsvError(ValueError):
    """Text that is not CSV; `line` is the first line of the row."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def strict_rows(lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, int, list[str]]]:
    """Yields (first line, last line, cells) of every row; lines count from 1, empty ones are left out.

    Raises `CsvError`.
    """
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    first = 1
    try:
        for cells in reader:
            if cells:
                yield first, reader.line_num, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise CsvError(first, _explain(error, first, reader.line_num)) from None


def _explain(error: csv.Error, first: int, last: int) -> str:
    text = str(error)
    spans = f"the cell spans {last - first + 1:,} lines, to line {last:,}" if last > first else ""
    if "unexpected end of data" in text:
        return (
            f"a quote is opened in this row and never closed: {spans or 'it is the last line'}, the end of "
            'the file; close it, or put the cell in quotes and write its own quote twice ("")'
        )
    spans = f" ({spans})" if spans else ""
    if "expected after" in text:
        return (
            f"a quoted cell goes on behind its closing quote{spans}; a quote inside a quoted cell is "
            'written twice ("")'
        )
    if "field larger" in text:
        return f"a cell has more than {MAX_CELL >> 20} Mi characters{spans}; is a quote never closed?"
    return f"{text}{spans}"
