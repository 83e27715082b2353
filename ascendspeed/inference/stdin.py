"""Reads the user's messages of a conversation from a terminal or a pipe. No torch."""

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
    """A message of the user."""

    text: str
    quoted: bool = False
    """True if it was between two lines of quotes: such a text is never a command."""


def read_stdin_message() -> UserMessage | None:
    """Returns the next message, None at the end of the input.

    Offers line editing at a terminal. Raises `UserError`.
    """
    if sys.stdin is None:
        return None
    if not sys.stdin.isatty():
        return read_message(sys.stdin.buffer)
    import readline  # noqa: F401 - gives `input` its line editing

    return _read_from_terminal()


def read_message(file: BinaryIO) -> UserMessage | None:
    """Returns the next message of a file, None at its end. Raises `UserError`."""

    def read_line(is_first: bool) -> str | None:
        line = file.readline()
        return _decode_line(line) if line else None

    return _parse_message(read_line)


def _parse_message(read_line: Callable[[bool], str | None]) -> UserMessage | None:
    """`read_line(is_first)` returns a line of a message without its end, None at the end of the input."""
    line = read_line(True)
    if line is None:
        return None
    if line.strip() != QUOTES:
        return UserMessage(line)
    lines: list[str] = []
    while (line := read_line(False)) is not None and line.strip() != QUOTES:
        lines.append(line)
    return UserMessage("\n".join(lines), quoted=True)


def _decode_line(line: bytes) -> str:
    try:
        return line.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8: {error.reason} at byte {error.start} of the line") from None


class _SigtermReceived(BaseException):
    """SIGTERM while the user types."""


def _read_from_terminal() -> UserMessage | None:
    """Reads a message with `input`; on SIGTERM leaves it by an exception, which restores the terminal's echo,
    then terminates."""
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        return _parse_message(_input_line)
    except _SigtermReceived:
        signal.signal(signal.SIGTERM, previous)
        signal.raise_signal(signal.SIGTERM)
        return None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise _SigtermReceived


def _input_line(is_first: bool) -> str | None:
    try:
        return input("> " if is_first else "")
    except EOFError:
        return None
