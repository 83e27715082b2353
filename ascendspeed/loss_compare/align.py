"""Aligns two loss curves step by step and refuses logs that do not belong together."""

import itertools
import math
from dataclasses import dataclass, replace

from ascendspeed.loss_compare.curve import AXES, Axis, LoggedStep, LossCurve
from ascendspeed.utils.errors import UserError

AXIS_NAMES = {
    "samples": "consumed samples",
    "tokens": "consumed tokens",
    "iteration": "iterations",
    "entry": "lines with a loss",
}
EPOCH_DIGITS = 0.0101
"""Largest difference of two epochs that are rounded to two decimals."""

_BATCHES = "runs of different batch sizes cannot be compared step by step"
REQUIRED_EQUAL = {
    "iteration": ("has made {} iterations", _BATCHES),
    "global_batch_size": ("has a global batch size of {}", _BATCHES),
    "interval": (
        "gives the mean loss of {} iterations",
        "these are means of other steps (a run that was resumed between two lines?); log every iteration, "
        "or compare a part of it",
    ),
}
"""Fields in which two steps at one position must agree if both logs have them: (text of the error, hint)."""


@dataclass(frozen=True)
class AlignedCurves:
    """Steps of a reference and a candidate at the same positions. Every loss is finite."""

    axis: Axis
    """Unit of the positions."""
    positions: tuple[int, ...]
    ref: tuple[LoggedStep, ...]
    cand: tuple[LoggedStep, ...]


def align(
    ref: LossCurve, cand: LossCurve, first: int | None = None, last: int | None = None
) -> AlignedCurves:
    """Aligns two curves by consumed samples, or by tokens or iterations if one of the logs lacks samples.

    A log without any of them is aligned by its lines. `first` and `last` select a part of the run, both
    inclusive, in units of that axis. Raises UserError if the positions, the batch sizes or the averaging
    intervals differ, or if a loss is missing or not finite.
    """
    axis = next((axis for axis in AXES if _increases(ref, axis) and _increases(cand, axis)), None)
    if axis is None and any(curve.steps[0].entry for curve in (ref, cand)):
        axis, ref, cand = "entry", _number_entries(ref), _number_entries(cand)
        _check_entries(ref, cand)
    if axis is None:
        raise UserError(
            f"{ref.path} and {cand.path} cannot be aligned: the logs share neither samples, tokens nor "
            "iterations"
        )
    ref_steps = _select(ref, axis, first, last)
    cand_steps = _select(cand, axis, first, last)
    _check_positions(ref, ref_steps, cand, cand_steps, axis)
    for position, ref_step in ref_steps.items():
        for field, (text, hint) in REQUIRED_EQUAL.items():
            ref_value = getattr(ref_step, field)
            cand_value = getattr(cand_steps[position], field)
            if None not in (ref_value, cand_value) and ref_value != cand_value:
                raise UserError(
                    f"at {position} {AXIS_NAMES[axis]} {ref.path} {text.format(ref_value)} and {cand.path} "
                    f"{cand_value}: {hint}"
                )
    _check_losses(ref, ref_steps, axis)
    _check_losses(cand, cand_steps, axis)
    return AlignedCurves(axis, tuple(ref_steps), tuple(ref_steps.values()), tuple(cand_steps.values()))


def _number_entries(curve: LossCurve) -> LossCurve:
    return replace(
        curve, steps=tuple(replace(step, entry=number) for number, step in enumerate(curve.steps, 1))
    )


def _check_entries(ref: LossCurve, cand: LossCurve) -> None:
    """Raises UserError unless the lines of both logs can be of the same steps."""
    advice = "lines without step numbers cannot be assigned: give trainer_state.json instead"
    if len(ref.steps) != len(cand.steps):
        raise UserError(
            f"{ref.path} has {len(ref.steps)} lines with a loss, {cand.path} {len(cand.steps)}: {advice}"
        )
    for ref_step, cand_step in zip(ref.steps, cand.steps, strict=True):
        epochs = ref_step.epoch, cand_step.epoch
        if None not in epochs and abs(epochs[0] - epochs[1]) > EPOCH_DIGITS:
            raise UserError(
                f"line {ref_step.entry} with a loss is of epoch {epochs[0]} in {ref.path} and {epochs[1]} in "
                f"{cand.path}: {advice}"
            )


def _increases(curve: LossCurve, axis: Axis) -> bool:
    values = [getattr(step, axis) for step in curve.steps]
    return None not in values and all(a < b for a, b in itertools.pairwise(values))


def _select(curve: LossCurve, axis: Axis, first: int | None, last: int | None) -> dict[int, LoggedStep]:
    """Returns position -> step between `first` and `last`. Raises UserError if there is none."""
    lowest = -math.inf if first is None else first
    highest = math.inf if last is None else last
    steps = {getattr(step, axis): step for step in curve.steps}
    selected = {position: step for position, step in steps.items() if lowest <= position <= highest}
    if not selected:
        part = f"from {'the start' if first is None else first} to {'the end' if last is None else last}"
        raise UserError(
            f"{curve.path}: no step {part}: this log goes from {min(steps)} to {max(steps)} "
            f"{AXIS_NAMES[axis]}"
        )
    return selected


def _check_positions(
    ref: LossCurve,
    ref_steps: dict[int, LoggedStep],
    cand: LossCurve,
    cand_steps: dict[int, LoggedStep],
    axis: Axis,
) -> None:
    unmatched = min(ref_steps.keys() ^ cand_steps.keys(), default=None)
    if unmatched is None:
        return
    present, absent = (ref, cand) if unmatched in ref_steps else (cand, ref)
    end = min(max(ref_steps), max(cand_steps))
    hint = f"; --last {end} compares what both have" if unmatched > end else ""
    raise UserError(
        f"{ref.path} has {len(ref_steps)} steps up to {max(ref_steps)} {AXIS_NAMES[axis]}, "
        f"{cand.path} {len(cand_steps)} up to {max(cand_steps)}: "
        f"{unmatched} is in {present.path} but not in {absent.path}{hint}"
    )


def _check_losses(curve: LossCurve, steps: dict[int, LoggedStep], axis: Axis) -> None:
    for position, step in steps.items():
        if fault := _fault(step):
            raise UserError(
                f"{curve.path}: at {position} {AXIS_NAMES[axis]} {fault}; such a run proves nothing (--first "
                "and --last compare a part of it)"
            )


def _fault(step: LoggedStep) -> str | None:
    if step.loss is None:
        return "there is no loss (a skipped iteration?)"
    if not math.isfinite(step.loss):
        return f"the loss is {step.loss}"
    if step.grad_norm is not None and math.isnan(step.grad_norm):
        return "the gradient norm is nan"
    return f"{step.nans} iterations were NaN" if step.nans else None
