"""Loss curve of a run, independent of the log's format, and the names under which logs report its fields."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Axis = Literal["samples", "tokens", "iteration", "entry"]
AXES: tuple[Axis, ...] = ("samples", "tokens", "iteration")
"""Units of a step's position, in order of preference: the first that two logs share aligns them. Entries of a
log are the last resort, for a log without any of these.
"""
INPUTS = "inputs"
"""Group of a config that records what a run has read."""
EXACT_DIGITS = 9
"""Decimal digits that distinguish all fp32 numbers."""


@dataclass(frozen=True)
class LoggedStep:
    """One logged interval of training. None: not in the log."""

    iteration: int | None = None
    samples: int | None = None
    """Samples consumed since the start of the run."""
    tokens: int | None = None
    """Tokens consumed since the start of the run."""
    loss: float | None = None
    """Loss per token, mean of the interval."""
    grad_norm: float | None = None
    skipped: int | None = None
    """Skipped iterations of the interval."""
    nans: int | None = None
    """NaN iterations of the interval."""
    train_iters: int | None = None
    """Iterations of the whole run."""
    global_batch_size: int | None = None
    seq_length: int | None = None
    ms: float | None = None
    """Milliseconds per iteration."""
    samples_per_s: float | None = None
    """Samples per second of all devices together."""
    tokens_per_s: float | None = None
    """Tokens per second and device."""
    tflops: float | None = None
    """TFLOP/s per device."""
    interval: int | None = None
    """Number of iterations over which the loss is averaged."""
    entry: int | None = None
    """Number of the line with a loss, in a log that has no other position."""
    epoch: float | None = None

    @property
    def position(self) -> int:
        """Position in the run: iteration, samples, tokens or entry, the first that is known."""
        positions = (self.iteration, self.samples, self.tokens, self.entry)
        return next(value for value in positions if value is not None)


@dataclass(frozen=True)
class LossCurve:
    """Log of one run."""

    path: str
    kind: str
    """Kind of log, for people."""
    steps: tuple[LoggedStep, ...]
    """Steps in order; steps that a resumed run repeated are replaced by the repetition."""
    config: Mapping[str, Any] | None = None
    """Settings of the run, flat or in groups, if the log or a run.json beside it has them."""
    device: str | None = None
    """Description of the device in the log."""
    digits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Significant decimal digits of `loss` and `grad_norm` in a log that is text."""
    replaced: int = 0
    """Number of steps that a resumed run repeated."""


# Normalized name -> (field of LoggedStep, factor). Names of one field in order of preference: `lm loss`
# before a sum with other losses.
FIELD_NAMES: dict[str, tuple[str, float]] = {
    **dict.fromkeys(
        ("iteration", "step", "steps", "global step", "current steps", "global step/max steps"),
        ("iteration", 1),
    ),
    **dict.fromkeys(
        ("consumed samples", "consumed train samples", "num consumed samples", "samples"), ("samples", 1)
    ),
    **dict.fromkeys(
        ("consumed tokens", "consumed train tokens", "num consumed tokens", "tokens"), ("tokens", 1)
    ),
    **dict.fromkeys(("lm loss", "loss", "train loss", "training loss", "reduced train loss"), ("loss", 1)),
    **dict.fromkeys(("grad norm", "total grad norm", "global grad norm", "gradient norm"), ("grad_norm", 1)),
    **dict.fromkeys(("number of skipped iterations", "inf nan skip batches", "skipped"), ("skipped", 1)),
    **dict.fromkeys(("number of nan iterations", "nans"), ("nans", 1)),
    **dict.fromkeys(("train iters", "total steps"), ("train_iters", 1)),
    "iterations in interval": ("interval", 1),
    # The second spelling is that of AscendSpeed's pages.
    **dict.fromkeys(("global batch size", "gloabl batch size"), ("global_batch_size", 1)),
    **dict.fromkeys(("actual seqlen", "seq length"), ("seq_length", 1)),
    **dict.fromkeys(("elapsed time per iteration(ms)", "elapsed time ms", "ms per iteration"), ("ms", 1)),
    **dict.fromkeys(("elapsed time per iteration(s)", "iter time(s)", "train step timing in s"), ("ms", 1e3)),
    **dict.fromkeys(("samples per second", "samples/sec"), ("samples_per_s", 1)),
    **dict.fromkeys(
        (
            "tokens/s/device",
            "tokens/sec/gpu",
            "tokens per gpu per second(tgs)",
            "tgs(tokens/gpu/second)",
            "tgs(tokens per gpu per second)",
            "tgs",
            "tps",
        ),
        ("tokens_per_s", 1),
    ),
    **dict.fromkeys(
        ("tflop/s/device", "throughput per gpu(tflop/s/gpu)", "tflops", "approx flops per gpu"), ("tflops", 1)
    ),
    "log entry": ("entry", 1),
    "epoch": ("epoch", 1),
}
INTEGER_FIELDS = {field.name for field in dataclasses.fields(LoggedStep) if field.type == (int | None)}
# `1.0/1.1` is current value/mean.
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))(?:/[-+.\de]+|tflops)?", re.I)


def normalize_name(name: str) -> str:
    """Normalizes a field's name: `Grad_Norm`, `grad-norm` -> `grad norm`; `iteration (ms)` ->
    `iteration(ms)`.
    """
    return " ".join(re.sub("[_-]", " ", name.lower()).split()).replace(" (", "(")


def parse_number(text: Any) -> float | None:
    """Parses the number of a log; None for text that is not a number or is abbreviated (`1.258B`)."""
    match = _NUMBER.fullmatch(str(text).strip())
    return float(match[1]) if match else None


def parse_step(fields: Mapping[str, Any]) -> LoggedStep | None:
    """Builds a step from the fields of a line, under any of the known names; None if it has no position."""
    normalized = {normalize_name(name): value for name, value in fields.items()}
    values: dict[str, Any] = {}
    for name, (field, factor) in FIELD_NAMES.items():
        value = parse_number(normalized[name]) if name in normalized and field not in values else None
        if value is not None and (field not in INTEGER_FIELDS or math.isfinite(value)):
            values[field] = int(value) if field in INTEGER_FIELDS else value * factor
    return LoggedStep(**values) if values.keys() & {*AXES, "entry"} else None


class SignificantDigits:
    """Counts the significant digits with which a log writes losses and gradient norms."""

    def __init__(self) -> None:
        # field -> {(significant digits, decimals)}
        self._seen: dict[str, set[tuple[int, int]]] = {"loss": set(), "grad_norm": set()}

    def count(self, fields: Mapping[str, Any]) -> None:
        """Counts the digits of one line, under the names that `parse_step` knows."""
        normalized = {normalize_name(name): value for name, value in fields.items()}
        for field, seen in self._seen.items():
            names = [
                name for name, (known, _) in FIELD_NAMES.items() if known == field and name in normalized
            ]
            text = str(normalized[names[0]]) if names else ""
            match = _NUMBER.fullmatch(text.strip())
            if match and match[1][-1] in "0123456789.":  # neither nan nor inf
                mantissa, *exponent = re.split("[eE]", match[1])
                digits = re.sub(r"\D", "", mantissa)
                seen.add((len(digits if exponent else digits.lstrip("0")), len(mantissa.partition(".")[2])))

    @property
    def by_field(self) -> dict[str, int]:
        """Field -> digits; a field without finite numbers has no entry.

        If all numbers have the same number of decimals, they are rounded to it and the shortest one counts.
        Otherwise each is written as short as possible, and the longest one counts.
        """
        digits = {}
        for field, seen in self._seen.items():
            if seen:
                fixed = len({decimals for _, decimals in seen}) == 1
                counts = [count for count, _ in seen]
                digits[field] = min(counts) if fixed else max(counts)
        return digits


def drop_replaced_steps(steps: Iterable[LoggedStep]) -> tuple[tuple[LoggedStep, ...], int]:
    """Returns the steps of one run, and the number of steps dropped.

    If the position goes back, the run was resumed or restarted: the later steps replace the earlier ones.
    """
    run: list[LoggedStep] = []
    dropped = 0
    for step in steps:
        while run and run[-1].position >= step.position:
            run.pop()
            dropped += 1
        run.append(step)
    return tuple(run), dropped


def flatten_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns setting -> text of a config, without its groups; only the hashes and contents of the group
    `inputs` keep its name, because settings have their names too."""
    settings: dict[str, str] = {}
    for name, value in config.items():
        if name == INPUTS and isinstance(value, Mapping):
            settings |= {f"{INPUTS}.{key}": text for key, text in flatten_config(value).items()}
        elif isinstance(value, Mapping):
            settings |= flatten_config(value)
        else:
            settings[name] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return settings
