"""Recognises the layouts of JSON files, and reads those that are not one object per line, strictly and one
row at a time."""

import codecs
import enum
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

from ascendspeed.data.readers.shard import InvalidValue

CHUNK = 1 << 16
WRAPPER = re.compile(
    r'\s*\{(?:\s*"[^"\\]*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[-+.\deE]+|true|false|null)\s*,)*\s*"data"\s*:\s*(?=\[\s*\{)'
)
"""Beginning of `{"data": [{...` up to the array; other keys before it have no nested values."""
MAX_WRAPPER_END = 1 << 20
"""Characters behind the array of a wrapper."""


class Layout(enum.Enum):
    """Arrangement of the rows in a JSON file."""

    LINES = "one object per line"
    ARRAY = "an array of objects"
    WRAPPED = "an array under the key data"
    OBJECTS = "objects over several lines"


class RepeatedKey(ValueError):
    """An object has a key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object for `json`. Raises `RepeatedKey`."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise RepeatedKey(_repeated(pairs))
    return table


def repeated_key(key: str) -> InvalidValue:
    """Returns the value for a row in which a key stands twice: either value may be the one that is meant."""
    return InvalidValue("repeated key", f"the key {key!r} occurs twice")


def malformed(reason: str) -> InvalidValue:
    """Returns the value for a row that is no JSON object."""
    return InvalidValue("malformed", f"not a JSON object: {reason}")


def not_an_object(value: Any) -> InvalidValue:
    """Returns the value for a row that is JSON, but no object."""
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return malformed(f"it is {names.get(type(value), 'null')}")


def recognise(head: bytes) -> Layout:
    """Recognises the layout by the first bytes of a file; `Layout.WRAPPED` needs its whole first line."""
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip()
    if text.startswith("["):
        return Layout.ARRAY
    line, newline, rest = text.partition("\n")
    if rest.strip() and _is_object(line):
        return Layout.LINES
    if WRAPPER.match(text):
        return Layout.WRAPPED
    return Layout.OBJECTS if newline and line.strip() == "{" else Layout.LINES


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Elements:
    """Takes JSON values from the text of a file, one at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._buffer = ""
        self._position = 0
        self._step = CHUNK
        self._repeated = ""
        self.rows = 0
        """Values taken so far."""

    def peek(self) -> str:
        """Returns the next character that is no white space; empty at the end."""
        while True:
            while self._position < len(self._buffer):
                if self._buffer[self._position] not in " \t\r\n":
                    return self._buffer[self._position]
                self._position += 1
            if not self._fill():
                return ""

    def skip(self, expected: str) -> None:
        """Takes the next character. Raises `ValueError` if it is another."""
        if self.peek() != expected:
            raise self.error(f"{expected!r}")
        self._position += 1

    def skip_match(self, pattern: re.Pattern[str]) -> None:
        """Takes the beginning of the text, which `pattern` matches."""
        self.peek()
        match = pattern.match(self._buffer)
        assert match is not None  # it has matched the head of the file
        self._position = match.end()

    def value(self) -> Any:
        """Takes a value; a row that is no object becomes an `InvalidValue`. Raises `ValueError`."""
        self.peek()
        while True:
            self._repeated = ""
            start = self._position
            try:
                value, end = self._decoder.raw_decode(self._buffer, start)
            except RecursionError:
                raise ValueError(f"row {self.rows + 1:,} is nested too deeply") from None
            except json.JSONDecodeError:
                if not self._fill():
                    raise self.error("a whole JSON value") from None
                continue
            except ValueError as error:  # an integer of more digits than Python converts
                raise ValueError(f"row {self.rows + 1:,}: {error}") from None
            if end < len(self._buffer):
                break
            if not self._fill():
                end -= start
                break
        self._position = end
        self.rows += 1
        self._step = CHUNK
        if self._repeated:
            return repeated_key(self._repeated)
        return value if isinstance(value, dict) else not_an_object(value)

    def rest(self) -> str:
        """Takes the rest of the text, at most `MAX_WRAPPER_END` characters."""
        return self._buffer[self._position :] + self._text.read(MAX_WRAPPER_END)

    def error(self, expected: str) -> ValueError:
        """Builds the error for other text than `expected`."""
        there = self._buffer[self._position : self._position + 40]
        where = f"after {self.rows:,} rows" if self.rows else "at the beginning"
        return ValueError(f"{where}, {expected} is expected, not {there!r}" if there else f"{where}, it ends")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            self._repeated = _repeated(pairs)
        return table

    def _fill(self) -> bool:
        """Reads on; False at the end of the file. Doubling keeps a huge value from many parses."""
        chunk = self._text.read(self._step)
        self._step *= 2
        self._buffer = self._buffer[self._position :] + chunk
        self._position = 0
        return bool(chunk)


def _repeated(pairs: list[tuple[str, Any]]) -> str:
    return Counter(key for key, _ in pairs).most_common(1)[0][0]


def rows(file: IO[bytes], layout: Layout) -> Iterator[Any]:
    """Yields the rows of a file in a layout other than lines.

    Raises `ValueError` if the text is damaged, or if rows would be lost.
    """
    elements = _Elements(file)
    if layout is Layout.OBJECTS:
        while elements.peek():
            yield elements.value()
        return
    if layout is Layout.WRAPPED:
        elements.skip_match(WRAPPER)
    yield from _array(elements)
    if layout is Layout.WRAPPED:
        _check_wrapper_end(elements.rest())
    elif elements.peek():
        raise elements.error("the end of the file")


def _array(elements: _Elements) -> Iterator[Any]:
    elements.skip("[")
    if elements.peek() == "]":
        elements.skip("]")
        return
    while True:
        yield elements.value()
        if elements.peek() == "]":
            elements.skip("]")
            return
        elements.skip(",")


def _check_wrapper_end(text: str) -> None:
    """Checks the text behind the array of `{"data": [...]`, and that no other key has nested values."""
    try:
        table = json.loads('{"data": 0' + text)
    except ValueError as error:
        raise ValueError(f"behind the array of 'data': {error}") from None
    nested = [key for key, value in table.items() if isinstance(value, list | dict) and value]
    if nested:
        raise ValueError(f"beside 'data' it has {nested[0]!r}, whose rows would be lost; split the file")
