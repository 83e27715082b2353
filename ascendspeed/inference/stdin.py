"""What a person says in a conversation, line by line: at a terminal, or through a pipe. No torch."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import BinaryIO

from ascendspeed.utils.errors import UserError

QUOTES = '"""'


@dataclass(frozen=True)
class UserMessage:
    """One message."""

    text: str
    quoted: bool = False
    """Whether it stood between two lines of quotes: then it is a message, whatever it says."""


def read_stdin_message() -> UserMessage | None:
    """The next message, None at the end; at a terminal with a line that can be edited. Raises `UserError`."""
    if sys.stdin is None:
        return None
    if not sys.stdin.isatty():
        return read_message(sys.stdin.buffer)
    import readline  # noqa: F401 - gives `input` its line editing

    return _from_terminal()


def read_message(file: BinaryIO) -> UserMessage | None:
    """The same of a file. Raises `UserError`."""
    return _message(lambda begins: _text(line) if (line := file.readline()) else None)


def _message(read: Callable[[bool], str | None]) -> UserMessage | None:
    """`read` gets whether a message begins, and gives a line without its end; None when there is none."""
    line = read(True)
    if line is None or line.strip() != QUOTES:
        return None if line is None else UserMessage(line)
    lines: list[str] = []
    while (line := read(False)) is not None and line.strip() != QUOTES:
        lines.append(line)
    return UserMessage("\n".join(lines), quoted=True)


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"what was typed is not UTF-8: {error.reason} at byte {error.start} of the line"
        ) from None


class _Ended(BaseException):
    """SIGTERM while somebody types."""


def _from_terminal() -> UserMessage | None:
    """SIGTERM ends the program as ever, but leaves `input` by an exception first, which gives the terminal its echo back."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return _message(_typed)
    except _Ended:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        return None
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended


def _typed(begins: bool) -> str | None:
    try:
        return input("> " if begins else "")
    except EOFError:
        return None
