"""Logger of rank 0: metric lines and messages go to stdout, train.log, TensorBoard and trackers. Imports no
torch."""

import contextlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

from ascendspeed.training.metric_lines import (
    NARROW_COLUMNS,
    MetricsLine,
    compact_line,
    format_line,
    scalars,
)
from ascendspeed.utils import logging as logs
from ascendspeed.utils import streams
from ascendspeed.utils.errors import UserError


class MetricsLogger:
    """Writes the log of rank 0: to stdout, `log_dir`/train.log (appended) and TensorBoard (scalars)."""

    def __init__(
        self,
        rank: int = 0,
        log_dir: str | Path | None = None,
        tensorboard_dir: str | Path | None = None,
        start_line: str = "",
    ) -> None:
        """Makes the folders; `start_line` goes to the file.

        Raises `UserError` if they cannot be written, or if TensorBoard is not installed.
        """
        self.is_writer = self._prints = rank == 0
        self.path = Path(log_dir, "train.log") if log_dir else None
        self._file = _append(self.path) if self.path and self.is_writer else None
        if self._file and start_line:
            self._file.write(start_line + "\n")
        self._board = _tensorboard(tensorboard_dir) if tensorboard_dir and self.is_writer else None
        self._sinks: list[MetricsSink] = []
        self._thread_hook = threading.excepthook
        if self._board:
            threading.excepthook = self._report_thread

    def say(self, text: str, terminal: str = "") -> None:
        """Writes one line. A log file that cannot be written is closed with a warning: training continues.

        `terminal`: what a terminal shows instead, if there is a file that has the whole line.
        """
        if not self.is_writer:
            return
        self._print(terminal if terminal and self._file and _is_terminal() else text)
        try:
            if self._file:
                self._file.write(text + "\n")
        except OSError as error:
            name, self._file = self._file.name, None
            self._print(f"warning: {name}: {error.strerror}; no more is written there")

    def _print(self, text: str) -> None:
        if not self._prints:
            return
        try:
            print(text, flush=True)
            streams.raise_loss()
        except OSError as error:
            self._prints = False
            _silence(sys.stdout)
            with contextlib.suppress(OSError):
                print(
                    f"warning: stdout: {error.strerror}; no more is written there",
                    file=sys.stderr,
                    flush=True,
                )
            self.say(f"warning: stdout: {error.strerror}; no more is written there")

    def line(self, line: MetricsLine) -> None:
        """Writes a metrics line, and its numbers to TensorBoard."""
        columns = shutil.get_terminal_size().columns
        self.say(format_line(line), compact_line(line, columns) if columns < NARROW_COLUMNS else "")
        try:
            for tag, value in scalars(line) if self._board else ():
                self._board.add_scalar(tag, value, line.iteration)
        except OSError as error:
            self._board = None
            self.say(f"warning: --tensorboard-dir: {error.strerror or error}; no more is written there")
        for sink in tuple(self._sinks):
            self._try(sink, lambda sink=sink: sink.write(line))

    def add_sinks(self, sinks: Iterable["MetricsSink"]) -> None:
        """Adds receivers of the metrics lines; one that fails is left out with a warning."""
        self._sinks += sinks

    def _try(self, sink: "MetricsSink", action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of any library; training continues
            name = getattr(sink, "name", type(sink).__name__)
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            self.say(f"warning: {name}: {reason[0][:200]}; no more is written there")
            self._sinks = [other for other in self._sinks if other is not sink]

    def _report_thread(self, error: threading.ExceptHookArgs) -> None:
        """Leaves out the traceback of TensorBoard's writing thread: the next line reports its error."""
        is_writer = type(error.thread).__module__.startswith("tensorboard.")
        if not (is_writer and issubclass(error.exc_type, OSError)):
            self._thread_hook(error)

    def close(self) -> None:
        """Flushes and closes; later lines still reach stdout."""
        for sink in tuple(self._sinks):
            self._try(sink, sink.close)
        self._sinks = []
        for sink in (self._file, self._board):
            if sink:
                with contextlib.suppress(OSError):  # a full disk; the run has ended anyway
                    sink.close()
        self._file = self._board = None
        threading.excepthook = self._thread_hook

    def __enter__(self) -> "MetricsLogger":
        """Receives the log lines of the library's modules until it is closed."""
        self._handled = logs.handled_by(_LineHandler(self))
        self._handled.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handled.__exit__(None, None, None)
        self.close()


class MetricsSink(Protocol):
    """Receiver of metrics lines on rank 0."""

    def write(self, line: MetricsLine) -> None:
        """Receives a line."""

    def close(self) -> None:
        """Ends the output."""


class _LineHandler(logging.Handler):
    """Passes log records to a `MetricsLogger`."""

    def __init__(self, log: MetricsLogger) -> None:
        super().__init__()
        self.setFormatter(logs.LineFormatter())
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say(self.format(record), getattr(record, "terminal", ""))


def _is_terminal() -> bool:
    with contextlib.suppress(ValueError, AttributeError):  # closed, or replaced
        return sys.stdout.isatty()
    return False


def _silence(stream: TextIO) -> None:
    """Redirects a stream to /dev/null: else the interpreter would fail at exit when it flushes the stream."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


def _append(path: Path) -> TextIO:
    """Opens a file for appending, line-buffered; an unfinished line of a killed run is ended first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - lives as long as the Logger
        with open(path, "rb") as written:
            unfinished = (
                written.seek(0, os.SEEK_END) and written.seek(-1, os.SEEK_END) and written.read() != b"\n"
            )
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the log: {error.strerror}; choose another --log-dir"
        ) from error
    if unfinished:
        file.write("\n")
    return file


def _tensorboard(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))
    except ImportError as error:
        raise UserError("--tensorboard-dir needs TensorBoard: pip install tensorboard") from error
    except OSError as error:
        raise UserError(f"--tensorboard-dir {folder}: {error.strerror}") from error
