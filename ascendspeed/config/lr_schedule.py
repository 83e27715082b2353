"""Learning-rate schedule as a pure function of the position, equal to
`megatron.core.optimizer_param_scheduler`. No torch.

The position counts completed updates, or, in a run of --train-samples, their samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ascendspeed.config.schema import OptimConfig, Run
from ascendspeed.utils.errors import UserError

Coefficient = Callable[[float], float]
"""Share of the decay that is over, 0 to 1 -> share of the way from the minimum to the peak."""
LINEAR: Coefficient = lambda done: 1.0 - done  # noqa: E731
COSINE: Coefficient = lambda done: 0.5 * (math.cos(math.pi * done) + 1.0)  # noqa: E731
DECAYS: dict[str, Coefficient] = {
    "linear": LINEAR,
    "cosine": COSINE,
    "exponential": lambda done: 2.0 * math.pow(0.5, done) - 1.0,
    "minus_sqrt": lambda done: 1.0 - math.sqrt(done),
}


@dataclass(frozen=True)
class Schedule:
    """Lengths of a schedule in one unit: iterations or samples."""

    optim: OptimConfig
    unit: str
    """`iters` or `samples`."""
    length: int
    """--train-iters or --train-samples."""

    @classmethod
    def of(cls, run: Run) -> "Schedule":
        """The schedule of a run."""
        samples = run.train.train_samples
        return (
            cls(run.optim, "iters", run.train.train_iters)
            if samples is None
            else cls(run.optim, "samples", samples)
        )

    def _setting(self, name: str) -> int | None:
        value: int | None = getattr(self.optim, f"{name}_{self.unit}")
        return value

    @property
    def decay(self) -> int:
        """Length, including warmup, until the learning rate reaches its minimum."""
        decay = self._setting("lr_decay")
        return self.length if decay is None else decay

    @property
    def warmup(self) -> float:
        """Length of warmup; not rounded if given as a fraction, as in Megatron."""
        if self.optim.lr_warmup_fraction is None:
            return self._setting("lr_warmup") or 0
        return self.optim.lr_warmup_fraction * self.decay

    @property
    def final_decay(self) -> int:
        """Length of the decay at the end of WSD."""
        return self._setting("lr_wsd_decay") or 0

    def lr(self, position: float) -> float:
        """Learning rate of the update after `position` completed ones.

        Skipped steps (overflow, NaN) do not count as completed, as in Megatron's loop. The first update has
        position 0, which gives learning rate 0 with warmup and the peak without. `check` validates the
        settings.
        """
        optim, warmup, decay = self.optim, self.warmup, self.decay
        if warmup > 0 and position <= warmup:
            return optim.lr * position / warmup
        if optim.lr_decay_style == "constant":
            return optim.lr
        if position > decay:
            return optim.min_lr
        if optim.lr_decay_style == "inverse-square-root":
            return max(optim.min_lr, optim.lr * max(warmup, 1) ** 0.5 / max(position, 1) ** 0.5)
        if optim.lr_decay_style == "WSD":
            start = decay - self.final_decay
            style = DECAYS[optim.lr_wsd_decay_style]
            coefficient = 1.0 if position <= start else style((position - start) / self.final_decay)
        else:
            coefficient = DECAYS[optim.lr_decay_style]((position - warmup) / (decay - warmup))
        return optim.min_lr + coefficient * (optim.lr - optim.min_lr)


def lr_at(iteration: int, optim: OptimConfig, train_iters: int) -> float:
    """Learning rate of the update after `iteration` completed ones, in a run of --train-iters."""
    return Schedule(optim, "iters", train_iters).lr(iteration)


def check(optim: OptimConfig, train_iters: int) -> None:
    """Raises `UserError` for an invalid schedule of a run of --train-iters."""
    check_schedule(Schedule(optim, "iters", train_iters))


def check_schedule(schedule: Schedule) -> None:
    """Raises `UserError` for an invalid schedule."""
    optim, unit = schedule.optim, schedule.unit
    if schedule.length < 1:
        raise UserError(f"--train-{unit} {schedule.length}: must be at least 1")
    if schedule.decay < 1:
        raise UserError(f"--lr-decay-{unit} {schedule.decay}: must be at least 1")
    for flag, value in (("lr", optim.lr), ("min-lr", optim.min_lr)):
        if not (0 <= value < math.inf):
            raise UserError(f"--{flag} {value:g}: must be a number that is not negative")
    if optim.lr_decay_style != "constant" and optim.min_lr > optim.lr:
        raise UserError(
            f"--min-lr {optim.min_lr:g} is above --lr {optim.lr:g}; choose a --min-lr of at most that"
        )
    _check_unit(schedule)
    _check_warmup(schedule)
    _check_final_decay(schedule)


def _check_unit(schedule: Schedule) -> None:
    """Raises `UserError` for lengths in the unit that the run does not count in."""
    other = "samples" if schedule.unit == "iters" else "iters"
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if value := getattr(schedule.optim, f"{name}_{other}"):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag}-{other} {value}: a run of --train-{schedule.unit} takes {flag}-{schedule.unit}"
            )


def _check_warmup(schedule: Schedule) -> None:
    optim, unit, warmup = schedule.optim, schedule.unit, schedule.warmup
    flag, length = f"--lr-warmup-{unit}", schedule._setting("lr_warmup") or 0
    if optim.lr_warmup_fraction is not None and length:
        both = f"--lr-warmup-fraction {optim.lr_warmup_fraction:g} and {flag} {length}"
        raise UserError(f"{both}: give one of them, not both")
    if optim.lr_warmup_fraction is not None and not (0 <= optim.lr_warmup_fraction < 1):
        raise UserError(f"--lr-warmup-fraction {optim.lr_warmup_fraction:g}: must be at least 0 and below 1")
    if length < 0:
        raise UserError(f"{flag} {length}: must not be negative")
    if warmup >= schedule.decay:
        of = f"--train-{unit}" if schedule._setting("lr_decay") is None else f"--lr-decay-{unit}"
        raise UserError(
            f"{flag} {warmup:g} must be below {of} {schedule.decay}, over which the learning rate decays"
        )


def _check_final_decay(schedule: Schedule) -> None:
    optim, length = schedule.optim, schedule._setting("lr_wsd_decay")
    flag = f"--lr-wsd-decay-{schedule.unit}"
    if optim.lr_decay_style != "WSD":
        if length is not None:
            raise UserError(f"{flag} {length} belongs to --lr-decay-style WSD; add it, or leave {flag} out")
        return
    if length is None:
        raise UserError(f"--lr-decay-style WSD: set {flag}, the length of the decay at its end")
    longest = schedule.decay - schedule.warmup
    if not 1 <= length <= longest:
        raise UserError(f"{flag} {length}: choose 1 to {longest:g}, what warmup leaves of {schedule.decay}")
