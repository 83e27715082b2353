"""Two curves, step beside step: what does not belong together is refused."""

import itertools
import math
from dataclasses import dataclass

from ascendspeed.loss_compare.curve import AXES, Axis, Curve, Step
from ascendspeed.utils.errors import UserError

WORDS = {"samples": "consumed samples", "tokens": "consumed tokens", "iteration": "iterations"}

_BATCHES = "runs of different batch sizes cannot be compared step by step"
SAME = {
    "iteration": ("has made {} iterations", _BATCHES),
    "global_batch_size": ("has a global batch size of {}", _BATCHES),
    "interval": (
        "gives the mean loss of {} iterations",
        "these are means of other steps (a run that was resumed between two lines?); log every iteration, or compare a part of it",
    ),
}
"""What two steps at one place must agree in, where both say it."""


@dataclass(frozen=True)
class Pair:
    """Steps of a reference and a candidate at the same places. Every loss is finite."""

    axis: Axis
    """What the places count."""
    places: tuple[int, ...]
    ref: tuple[Step, ...]
    cand: tuple[Step, ...]


def align(ref: Curve, cand: Curve, first: int | None = None, last: int | None = None) -> Pair:
    """Puts both beside each other by consumed samples; by tokens or iterations where one of the logs does not say samples.

    `first`, `last`: the part of the run to compare, both included, on that axis. Raises `UserError` when the places are not
    the same ones, when the batches or what a line is a mean of are not, or when a loss is missing or not a number.
    """
    axis = next((axis for axis in AXES if _grows(ref, axis) and _grows(cand, axis)), None)
    if axis is None:
        raise UserError(
            f"{ref.path} and {cand.path} cannot be aligned: neither samples, tokens nor iterations are said in both"
        )
    a, b = _cut(ref, axis, first, last), _cut(cand, axis, first, last)
    _check_places(ref, a, cand, b, axis)
    for place, step in a.items():
        for field, (has, hint) in SAME.items():
            one, other = getattr(step, field), getattr(b[place], field)
            if None not in (one, other) and one != other:
                raise UserError(
                    f"at {place} {WORDS[axis]} {ref.path} {has.format(one)} and {cand.path} {other}: {hint}"
                )
    for curve, steps in ((ref, a), (cand, b)):
        _check_losses(curve, steps, axis)
    return Pair(axis, tuple(a), tuple(a.values()), tuple(b.values()))


def _grows(curve: Curve, axis: Axis) -> bool:
    values = [getattr(step, axis) for step in curve.steps]
    return None not in values and all(a < b for a, b in itertools.pairwise(values))


def _cut(curve: Curve, axis: Axis, first: int | None, last: int | None) -> dict[int, Step]:
    least, most = -math.inf if first is None else first, math.inf if last is None else last
    steps = {getattr(step, axis): step for step in curve.steps}
    kept = {place: step for place, step in steps.items() if least <= place <= most}
    if not kept:
        asked = f"from {'the start' if first is None else first} to {'the end' if last is None else last}"
        raise UserError(
            f"{curve.path}: no step {asked}: this log goes from {min(steps)} to {max(steps)} {WORDS[axis]}"
        )
    return kept


def _check_places(ref: Curve, a: dict[int, Step], cand: Curve, b: dict[int, Step], axis: Axis) -> None:
    alone = min(a.keys() ^ b.keys(), default=None)
    if alone is None:
        return
    holder, lacks = (ref, cand) if alone in a else (cand, ref)
    end = min(max(a), max(b))
    part = f"; --last {end} compares what both have" if alone > end else ""
    raise UserError(
        f"{ref.path} has {len(a)} steps up to {max(a)} {WORDS[axis]}, {cand.path} {len(b)} up to {max(b)}: "
        f"{alone} stands in {holder.path} and not in {lacks.path}{part}"
    )


def _check_losses(curve: Curve, steps: dict[int, Step], axis: Axis) -> None:
    for place, step in steps.items():
        wrong = (
            "there is no loss (a skipped iteration?)"
            if step.loss is None
            else f"the loss is {step.loss}"
            if not math.isfinite(step.loss)
            else "the gradient norm is nan"
            if step.grad_norm is not None and math.isnan(step.grad_norm)
            else f"{step.nans} iterations were NaN"
            if step.nans
            else None
        )
        if wrong:
            raise UserError(
                f"{curve.path}: at {place} {WORDS[axis]} {wrong}; nothing is proven by such a run "
                "(--first and --last compare a part of it)"
            )
