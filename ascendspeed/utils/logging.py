"""Log lines of the library: modules use `logging.getLogger(__name__)`, a command installs one handler for
rank 0.

Nothing is installed on import. `errors.run` sends the lines of a command to stdout; `configure` chooses other
streams, and training installs the handler of its log file (`training.metrics_log`).
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping

LIBRARY = "ascendspeed"
TO_STDOUT: Mapping[str, str] = {LIBRARY: "stdout", f"{LIBRARY}.checkpoint": "stderr"}
"""Logger -> stream, the longest name that matches decides: commands that print a report."""
TO_STDERR: Mapping[str, str] = {LIBRARY: "stderr", f"{LIBRARY}.evaluation.runner": "stdout"}
"""Commands whose stdout is a model's answers."""


class RankFilter(logging.Filter):
    """Passes the records of rank 0: the ranks of a run log the same lines."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """True on rank 0."""
        return self.rank == 0


class LineFormatter(logging.Formatter):
    """The message alone; a warning begins with "warning: "."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of text."""
        return f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}"


class ConsoleHandler(logging.Handler):
    """Prints to stdout or stderr, whatever these are at the time of the call, and flushes."""

    def __init__(self, streams: Mapping[str, str]) -> None:
        """`streams`: logger -> "stdout" or "stderr"; the longest name that is a prefix decides."""
        super().__init__()
        self.streams = streams
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Raises `OSError` when the stream cannot be written."""
        matching = [name for name in self.streams if f"{record.name}.".startswith(f"{name}.")]
        stream = self.streams[max(matching, key=len)]
        print(self.format(record), file=getattr(sys, stream), flush=True)


def configure(rank: int | None = None, streams: Mapping[str, str] = TO_STDOUT) -> None:
    """Sends the library's log lines to the console, in place of any earlier handler.

    `rank`: by default that of the launcher.
    """
    handler = ConsoleHandler(streams)
    handler.addFilter(RankFilter(int(os.environ.get("RANK", "0")) if rank is None else rank))
    _install([handler])


@contextlib.contextmanager
def handled_by(handler: logging.Handler) -> Iterator[None]:
    """Inside the block, `handler` gets the library's log lines and no other handler does."""
    earlier = _install([handler])
    try:
        yield
    finally:
        _install(earlier)


def _install(handlers: list[logging.Handler]) -> list[logging.Handler]:
    """Replaces the handlers of the library's logger and returns the earlier ones."""
    library = logging.getLogger(LIBRARY)
    earlier = library.handlers[:]
    library.handlers[:] = handlers
    library.setLevel(logging.INFO)
    library.propagate = not handlers  # other libraries install handlers on the root logger
    return earlier
