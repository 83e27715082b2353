"""Reader of TensorBoard event files: this project's, Megatron-LM's, Megatron-DeepSpeed's and those of
DeepSpeed's monitor.
"""

import logging
from pathlib import Path

from ascendspeed.loss_compare.curve import (
    AXES,
    FIELD_NAMES,
    Axis,
    LossCurve,
    drop_replaced_steps,
    normalize_name,
    parse_step,
)
from ascendspeed.utils.errors import UserError

Series = list[tuple[int, float]]
"""(position, value) in the order of writing."""
EVALUATION_WORDS = ("valid", "eval", "test")


def read_events(path: str | Path) -> LossCurve:
    """Reads the training curve of an event file or a folder of them. Raises UserError if there is no loss."""
    series = _scalars(path)
    axis = next((axis for axis in ("iteration", "samples", "tokens") if (axis, "lm loss") in series), None)
    if axis is None:
        raise UserError(f"{path}: these events have no loss under a known name (lm loss, train_loss, loss)")
    if axis == "iteration":
        _add_consumed(series)
    columns = {
        name: dict(values)
        for (series_axis, name), values in series.items()
        if series_axis == axis and name != "lm loss"
    }
    steps = []
    for position, loss in series[axis, "lm loss"]:
        values = {name: column[position] for name, column in columns.items() if position in column}
        if step := parse_step({axis: position, "loss": loss} | values):
            steps.append(step)
    run_steps, replaced = drop_replaced_steps(steps)
    return LossCurve(str(path), "TensorBoard events", run_steps, replaced=replaced)


def _scalars(path: str | Path) -> dict[tuple[Axis, str], Series]:
    # TensorBoard warns of a truncated file and reads its complete events.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    try:
        events = EventAccumulator(str(path), {"scalars": 0}, purge_orphaned_data=False).Reload()
        tags = sorted(events.Tags()["scalars"], key=_preference, reverse=True)
        series: dict[tuple[Axis, str], Series] = {}
        for tag in tags:
            axis, name = _parse_tag(tag)
            if axis:
                series[axis, name] = [(event.step, event.value) for event in events.Scalars(tag)]
        return series
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read these TensorBoard events: {error}") from error


def _parse_tag(tag: str) -> tuple[Axis | None, str]:
    """Returns the axis of a tag's steps and the name of its value: `lm-loss-training/lm loss vs samples` ->
    (samples, lm loss).
    """
    group, _, name = tag.rpartition("/")
    name, _, against = normalize_name(name).partition(" vs ")
    fields = {known: field for known, (field, _) in FIELD_NAMES.items()}
    if (
        name not in fields
        or against not in ("", "samples", "tokens")
        or any(word in normalize_name(group) for word in EVALUATION_WORDS)
    ):
        return None, name
    # DeepSpeed's monitor counts samples.
    axis = against or ("samples" if tag.startswith("Train/Samples/") else "iteration")
    return axis, "lm loss" if fields[name] == "loss" else name


def _preference(tag: str) -> int:
    """Sort key of tags of one field: `lm loss` before `loss`.

    The preferred one is read last and overwrites the others.
    """
    names = list(FIELD_NAMES)
    name = normalize_name(tag.rpartition("/")[2]).partition(" vs ")[0]
    return names.index(name) if name in FIELD_NAMES else len(names)


def _add_consumed(series: dict[tuple[Axis, str], Series]) -> None:
    """Adds consumed samples and tokens of every iteration, from the same losses plotted against them."""
    iterations = [position for position, _ in series["iteration", "lm loss"]]
    for axis in AXES[:2]:
        plotted = series.get((axis, "lm loss"), [])
        if len(plotted) == len(iterations):
            consumed = [position for position, _ in plotted]
            series["iteration", f"consumed {axis}"] = list(zip(iterations, consumed, strict=True))
