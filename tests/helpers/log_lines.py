"""Captures the log lines of the library in a test."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ascendspeed.utils.logging import LineFormatter, handled_by


class _ListHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """The lines that the library logs inside the block, of all threads of this process, in order."""
    handler = _ListHandler()
    with handled_by(handler):
        yield handler.lines
