"""Training log lines in Megatron's format: formatting, parsing, and the logger of rank 0.

Imports no torch.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from ascendspeed.utils import logging as logs
from ascendspeed.utils import streams
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class TrainLine:
    """One interval of training. Fields that are None are left out of the line."""

    time: str
    """Local time, `YYYY-MM-DD hh:mm:ss`."""
    iteration: int
    train_iters: int
    samples: int | None = None
    """Consumed since the start of the run; tokens too."""
    tokens: int | None = None
    ms_per_iteration: float | None = None
    tokens_per_s: float | None = None
    """Per device; TFLOP/s too."""
    tflops: float | None = None
    mfu: float | None = None
    """Share of the device's peak, 0 to 1."""
    lr: float | None = None
    global_batch_size: int | None = None
    loss: float | None = None
    """Mean over the supervised tokens (or the pairs) of the interval; NaN if all iterations were skipped."""
    chosen_reward: float | None = None
    """Means over the preference pairs of the interval, here and in the next three fields."""
    rejected_reward: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None
    """Share of the pairs whose chosen answer has the larger reward."""
    aux_loss: float | None = None
    """Load-balancing loss of the experts, mean over the interval, without its coefficient; z_loss too."""
    z_loss: float | None = None
    interval: int | None = None
    """Iterations since the last line, or since the run was resumed."""
    loss_scale: float | None = None
    grad_norm: float | None = None
    skipped: int | None = None
    """Skipped iterations of the interval; `nans` counts those with a non-finite loss."""
    nans: int | None = None
    memory_gib: float | None = None
    """Peak on the device (rank 0)."""
    seconds_left: int | None = None


@dataclass(frozen=True)
class EvalLine:
    """Result of one evaluation."""

    iteration: int
    loss: float
    """Mean over the supervised tokens."""
    split: str = "validation"

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.inf if self.loss > 709 else math.exp(self.loss)


@dataclass(frozen=True)
class ScoreLine:
    """Score of the model on a benchmark during training."""

    iteration: int
    task: str
    metric: str
    """The benchmark's main metric."""
    score: float
    """Mean of the metric over all questions."""
    questions: int


MetricsLine = TrainLine | EvalLine | ScoreLine


@dataclass(frozen=True)
class _Field:
    label: str
    name: str
    write: Callable[[Any], str]
    read: Callable[[str], Any] = float


def _hms(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _seconds(text: str) -> int:
    h, m, s = text.split(":")
    return int(h) * 3600 + int(m) * 60 + int(s)


def _unit(unit: str) -> Callable[[str], float]:
    return lambda text: float(text.removesuffix(unit))


FIELDS = (
    _Field("consumed samples", "samples", "{:12d}".format, int),
    _Field("consumed tokens", "tokens", "{:14d}".format, int),
    _Field("elapsed time per iteration (ms)", "ms_per_iteration", "{:.1f}".format),
    _Field("tokens/s/device", "tokens_per_s", "{:.1f}".format),
    _Field("TFLOP/s/device", "tflops", "{:.3f}".format),
    _Field("MFU", "mfu", "{:.2%}".format, lambda text: float(text.removesuffix("%")) / 100),
    _Field("learning rate", "lr", "{:.6E}".format),
    _Field("global batch size", "global_batch_size", "{:5d}".format, int),
    _Field("lm loss", "loss", "{:.8E}".format),  # 9 digits: every fp32 number comes back exactly
    _Field("load_balancing_loss", "aux_loss", "{:.8E}".format),
    _Field("z_loss", "z_loss", "{:.8E}".format),
    _Field("rewards/chosen", "chosen_reward", "{:.8E}".format),
    _Field("rewards/rejected", "rejected_reward", "{:.8E}".format),
    _Field("rewards/margins", "reward_margin", "{:.8E}".format),
    _Field("rewards/accuracies", "reward_accuracy", "{:.6f}".format),
    _Field("iterations in interval", "interval", "{:3d}".format, int),
    _Field("loss scale", "loss_scale", "{:.1f}".format),
    _Field("grad norm", "grad_norm", "{:.8E}".format),
    _Field("number of skipped iterations", "skipped", "{:3d}".format, int),
    _Field("number of nan iterations", "nans", "{:3d}".format, int),
    _Field("memory", "memory_gib", "{:.2f} GiB".format, _unit(" GiB")),
    _Field("time left", "seconds_left", _hms, _seconds),
)
MEGATRON_TAGS = {
    "lr": ("learning-rate", 1),
    "global_batch_size": ("batch-size", 1),
    "loss_scale": ("loss-scale", 1),
    "grad_norm": ("grad-norm", 1),
    "ms_per_iteration": ("iteration-time", 1e-3),
    "tflops": ("throughput", 1),
}
"""Field -> tag of Megatron-LM's TensorBoard events, and the factor to its unit."""
COMPACT_FIELDS = ("loss", "skipped", "nans", "seconds_left", "lr", "grad_norm", "tokens_per_s")
"""Fields of a line on a narrow terminal, the most important ones first; skipped iterations only if any."""
NARROW_COLUMNS = 120
"""Terminals below this width get the compact line."""
_ITERATION = re.compile(r"\biteration\s+(\d+)\s*/\s*(\d+)\s*$")
_TIME = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^]]*\] iteration +\d+/ *\d+ $")
_SCORE = re.compile(r"\bscore at iteration +(\d+) \| (\S+) (\S+): (\S+) \| questions: (\d+) \|\s*$")
_EVAL = re.compile(r"\b(\w+) loss at iteration +(\d+) \| lm loss value: (\S+) \| lm loss PPL: \S+ \|\s*$")


def format_line(line: MetricsLine) -> str:
    """Text of a line, without the newline."""
    if isinstance(line, ScoreLine):
        score = f"{line.task} {line.metric}: {line.score:.8E} | questions: {line.questions}"
        return f" score at iteration {line.iteration} | {score} |"
    if isinstance(line, EvalLine):
        numbers = f"lm loss value: {line.loss:.8E} | lm loss PPL: {line.perplexity:.6E}"
        return f" {line.split} loss at iteration {line.iteration} | {numbers} |"
    values = ((field, getattr(line, field.name)) for field in FIELDS)
    texts = (f"{field.label}: {field.write(value)} |" for field, value in values if value is not None)
    return " ".join([f" [{line.time}] iteration {line.iteration:8d}/{line.train_iters:8d} |", *texts])


def compact_line(line: MetricsLine, columns: int) -> str:
    """Text of a line for a narrow terminal: as many of `COMPACT_FIELDS` as fit, loss first.

    `split_fields` reads it as it reads the full line.
    """
    if not isinstance(line, TrainLine):
        return format_line(line)
    text = f" iteration {line.iteration}/{line.train_iters} |"
    fields = {field.name: field for field in FIELDS}
    for name in COMPACT_FIELDS:
        value = getattr(line, name)
        if value is None or (name in ("skipped", "nans") and not value):
            continue
        part = f" {fields[name].label}: {fields[name].write(value).strip()} |"
        if name == "loss" or len(text) + len(part) <= columns:
            text += part
    return text


def split_fields(text: str) -> dict[str, str] | None:
    """Splits `iteration 10/ 100 | consumed samples: 640 | ... |` into label -> text, with `iteration` and
    `train iters`.

    Reads every log of Megatron's format. Text after the last bar may be cut off and is ignored. Returns None
    unless there is exactly one iteration: in two lines that ran into each other, fields cannot be assigned to
    their line.
    """
    parts = text.split("|")[:-1]
    heads = [match for part in parts if "iteration" in part and (match := _ITERATION.search(part))]
    if len(heads) != 1:
        return None
    labelled = (part.partition(":") for part in parts)
    fields = {label.strip(): value.strip() for label, _, value in labelled}
    return fields | {"iteration": heads[0][1], "train iters": heads[0][2]}


def parse_line(text: str) -> MetricsLine | None:
    """Parses a line of `format_line`; returns None for other text and for truncated lines.

    Unknown labels are ignored, so that Megatron-LM's own logs are read as well.
    """
    try:
        if match := _EVAL.search(text):
            return EvalLine(int(match[2]), float(match[3]), match[1])
        if match := _SCORE.search(text):
            return ScoreLine(int(match[1]), match[2], match[3], float(match[4]), int(match[5]))
        time = _TIME.search(text.partition("|")[0])
        fields = split_fields(text) if time and text.rstrip().endswith("|") else None
        if fields:
            known = {field.name: field.read(fields[field.label]) for field in FIELDS if field.label in fields}
            return TrainLine(time[1], int(fields["iteration"]), int(fields["train iters"]), **known)
    except ValueError:
        pass
    return None


def read_lines(path: str | Path) -> Iterator[MetricsLine]:
    """Reads the metric lines of a log file in order and ignores all others.

    Raises `UserError` if it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from (line for line in map(parse_line, file) if line is not None)
    except OSError as error:
        raise UserError(f"{path}: cannot read this log: {error.strerror}") from error


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


def scalars(line: MetricsLine) -> Iterator[tuple[str, float]]:
    """Yields (tag, value) for TensorBoard and trackers: the labels of the log, and Megatron-LM's tags."""
    if isinstance(line, EvalLine):
        yield f"lm loss {line.split}", line.loss
        yield f"lm loss {line.split} ppl", line.perplexity
        return
    if isinstance(line, ScoreLine):
        yield f"score {line.task} {line.metric}", line.score
        return
    for name, (tag, factor) in MEGATRON_TAGS.items():
        if (value := getattr(line, name)) is not None:
            yield tag, value * factor
    for label, value in ((f.label, getattr(line, f.name)) for f in FIELDS if f.name != "seconds_left"):
        if value is not None:
            yield label, value


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
