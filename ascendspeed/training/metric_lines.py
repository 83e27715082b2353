"""Metric lines of the training log in Megatron's format: formatting and parsing. Imports no torch."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
