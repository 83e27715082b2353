"""What a log of any kind says of a run, in one form; and the names under which logs say it."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Axis = Literal["samples", "tokens", "iteration"]
AXES: tuple[Axis, ...] = ("samples", "tokens", "iteration")
"""Where a step stands in its run; the first that two logs share aligns them."""
EXACT = 9
"""Decimal digits that tell all fp32 numbers apart."""


@dataclass(frozen=True)
class Step:
    """One logged interval of training. What is None is not said."""

    iteration: int | None = None
    samples: int | None = None
    """Consumed since the start of the run, as are tokens."""
    tokens: int | None = None
    loss: float | None = None
    """Per token, mean of the interval."""
    grad_norm: float | None = None
    skipped: int | None = None
    """Skipped iterations of the interval, as are NaN ones."""
    nans: int | None = None
    train_iters: int | None = None
    """Iterations of the whole run."""
    global_batch_size: int | None = None
    seq_length: int | None = None
    ms: float | None = None
    """Milliseconds per iteration."""
    samples_per_s: float | None = None
    """Of all devices together."""
    tokens_per_s: float | None = None
    """Per device, as are TFLOP/s."""
    tflops: float | None = None
    interval: int | None = None
    """Iterations that the loss is the mean of."""

    @property
    def place(self) -> int:
        """Where it stands, on the finest axis that is known."""
        return next(value for value in (self.iteration, self.samples, self.tokens) if value is not None)


@dataclass(frozen=True)
class Curve:
    """The log of one run."""

    path: str
    kind: str
    """Of the log, in words."""
    steps: tuple[Step, ...]
    """In order; what a run that was killed did beyond its last checkpoint is replaced by what its successor did."""
    config: Mapping[str, Any] | None = None
    """The run's settings, flat or in groups, where the log or a run.json beside it holds them."""
    device: str | None = None
    """What the log says of the machine."""
    digits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Significant decimal digits of `loss` and of `grad_norm`, where the log is a text that shows some."""
    replaced: int = 0
    """Steps that a resumed run did once more."""


# Normalised name -> (field of Step, factor). Names of one field in order of preference: `lm loss` before a sum with other losses.
NAMES: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("iteration", "step", "steps", "global step", "current steps"), ("iteration", 1)),
    **dict.fromkeys(
        ("consumed samples", "consumed train samples", "num consumed samples", "samples"), ("samples", 1)
    ),
    **dict.fromkeys(
        ("consumed tokens", "consumed train tokens", "num consumed tokens", "tokens"), ("tokens", 1)
    ),
    **dict.fromkeys(("lm loss", "loss", "train loss", "training loss"), ("loss", 1)),
    **dict.fromkeys(("grad norm", "total grad norm", "global grad norm", "gradient norm"), ("grad_norm", 1)),
    **dict.fromkeys(("number of skipped iterations", "inf nan skip batches", "skipped"), ("skipped", 1)),
    **dict.fromkeys(("number of nan iterations", "nans"), ("nans", 1)),
    **dict.fromkeys(("train iters", "total steps"), ("train_iters", 1)),
    "iterations in interval": ("interval", 1),
    **dict.fromkeys(
        ("global batch size", "gloabl batch size"), ("global_batch_size", 1)
    ),  # so AscendSpeed's pages
    **dict.fromkeys(("actual seqlen", "seq length"), ("seq_length", 1)),
    **dict.fromkeys(("elapsed time per iteration(ms)", "elapsed time ms", "ms per iteration"), ("ms", 1)),
    **dict.fromkeys(("elapsed time per iteration(s)", "iter time(s)"), ("ms", 1e3)),
    **dict.fromkeys(("samples per second", "samples/sec"), ("samples_per_s", 1)),
    **dict.fromkeys(
        (
            "tokens/s/device",
            "tokens/sec/gpu",
            "tokens per gpu per second(tgs)",
            "tgs(tokens/gpu/second)",
            "tgs(tokens per gpu per second)",
        ),
        ("tokens_per_s", 1),
    ),
    **dict.fromkeys(
        ("tflop/s/device", "throughput per gpu(tflop/s/gpu)", "tflops", "approx flops per gpu"), ("tflops", 1)
    ),
}
WHOLE = {field.name for field in dataclasses.fields(Step) if field.type == (int | None)}
_NUMBER = re.compile(
    r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))(?:/[-+.\de]+|tflops)?", re.I
)  # 1.0/1.1 is now/mean


def normal(name: str) -> str:
    """`Grad_Norm`, `grad-norm` -> `grad norm`; `iteration (ms)` -> `iteration(ms)`."""
    return " ".join(re.sub("[_-]", " ", name.lower()).split()).replace(" (", "(")


def number(text: Any) -> float | None:
    """The number that a log shows; None when it is none, or none that can be relied on (`1.258B`)."""
    match = _NUMBER.fullmatch(str(text).strip())
    return float(match[1]) if match else None


def step_of(said: Mapping[str, Any]) -> Step | None:
    """The step that a line says under any of the known names; None when it does not say where it stands."""
    known = {normal(name): value for name, value in said.items()}
    found: dict[str, Any] = {}
    for name, (field, factor) in NAMES.items():
        value = number(known[name]) if name in known and field not in found else None
        if value is not None and (field not in WHOLE or math.isfinite(value)):
            found[field] = int(value) if field in WHOLE else value * factor
    return Step(**found) if found.keys() & set(AXES) else None


class Digits:
    """Counts the significant digits that a log's losses and gradient norms are written with."""

    def __init__(self) -> None:
        """Of a log without lines."""
        self._seen: dict[str, set[tuple[int, int]]] = {
            "loss": set(),
            "grad_norm": set(),
        }  # (significant digits, decimals)

    def count(self, said: Mapping[str, Any]) -> None:
        """Looks at one line, by the names of `step_of`."""
        known = {normal(name): value for name, value in said.items()}
        for field, seen in self._seen.items():
            text = next(
                (str(known[name]) for name, (of, _) in NAMES.items() if of == field and name in known), ""
            )
            match = _NUMBER.fullmatch(text.strip())
            if match and match[1][-1] in "0123456789.":  # neither nan nor inf
                mantissa, *exponent = re.split("[eE]", match[1])
                digits = re.sub(r"\D", "", mantissa)
                seen.add((len(digits if exponent else digits.lstrip("0")), len(mantissa.partition(".")[2])))

    @property
    def found(self) -> dict[str, int]:
        """Field -> digits; a field without finite numbers has no entry.

        With as many decimals everywhere, the numbers are rounded to them, and the shortest one counts. Else they are written as
        short as they can be, and the longest does.
        """
        least = {field: len({decimals for _, decimals in seen}) == 1 for field, seen in self._seen.items()}
        return {
            field: (min if least[field] else max)(n for n, _ in seen)
            for field, seen in self._seen.items()
            if seen
        }


def continuous(steps: Iterable[Step]) -> tuple[tuple[Step, ...], int]:
    """The steps of one run, and how many were replaced: a log that goes back is that of a run that was resumed, or begun again."""
    kept: list[Step] = []
    replaced = 0
    for step in steps:
        while kept and kept[-1].place >= step.place:
            kept.pop()
            replaced += 1
        kept.append(step)
    return tuple(kept), replaced


def flat(config: Mapping[str, Any]) -> dict[str, str]:
    """A config without its groups, as text: setting -> value."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value)
        else:
            found[name] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return found
