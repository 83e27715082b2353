"""TensorBoard event files: ours, Megatron-LM's, Megatron-DeepSpeed's and those of DeepSpeed's monitor."""

import logging
from pathlib import Path

from ascendspeed.loss_compare.curve import AXES, NAMES, Axis, Curve, continuous, normal, step_of
from ascendspeed.utils.errors import UserError

Series = list[tuple[int, float]]
"""(where, value), in the order in which they were written."""
OTHERS = ("valid", "eval", "test")


def read(path: str | Path) -> Curve:
    """The training curve in a folder of event files, or in one of them. Raises `UserError` when they hold no loss."""
    series = _scalars(path)
    axis = next((axis for axis in ("iteration", "samples", "tokens") if (axis, "lm loss") in series), None)
    if axis is None:
        raise UserError(f"{path}: these events hold no loss under a known name (lm loss, train_loss, loss)")
    if axis == "iteration":
        _add_places(series)
    columns = {
        name: dict(values) for (where, name), values in series.items() if where == axis and name != "lm loss"
    }
    steps = (
        step_of(
            {axis: where, "loss": value}
            | {name: column[where] for name, column in columns.items() if where in column}
        )
        for where, value in series[axis, "lm loss"]
    )
    kept, replaced = continuous(step for step in steps if step)
    return Curve(str(path), "TensorBoard events", kept, replaced=replaced)


def _scalars(path: str | Path) -> dict[tuple[Axis, str], Series]:
    logging.getLogger("tensorboard").setLevel(
        logging.ERROR
    )  # of a file that is cut off, it reads what is whole, and warns
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    try:
        events = EventAccumulator(str(path), {"scalars": 0}, purge_orphaned_data=False).Reload()
        tags = [(tag, *_meaning(tag)) for tag in sorted(events.Tags()["scalars"], key=_rank, reverse=True)]
        return {
            (axis, name): [(e.step, e.value) for e in events.Scalars(tag)] for tag, axis, name in tags if axis
        }
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read these TensorBoard events: {error}") from error


def _meaning(tag: str) -> tuple[Axis | None, str]:
    """`lm-loss-training/lm loss vs samples` -> (samples, lm loss): what the steps of a tag count, and the name of its value."""
    group, _, name = tag.rpartition("/")
    name, _, against = normal(name).partition(" vs ")
    fields = {known: field for known, (field, _) in NAMES.items()}
    if (
        name not in fields
        or against not in ("", "samples", "tokens")
        or any(word in normal(group) for word in OTHERS)
    ):
        return None, name
    axis = against or (
        "samples" if tag.startswith("Train/Samples/") else "iteration"
    )  # DeepSpeed's monitor counts samples
    return axis, "lm loss" if fields[name] == "loss" else name


def _rank(tag: str) -> int:
    """`lm loss` goes before `loss`: the preferred of several names is read last and stays."""
    names = list(NAMES)
    name = normal(tag.rpartition("/")[2]).partition(" vs ")[0]
    return names.index(name) if name in NAMES else len(names)


def _add_places(series: dict[tuple[Axis, str], Series]) -> None:
    """Samples and tokens of every iteration, from the same losses drawn against them."""
    iterations = [where for where, _ in series["iteration", "lm loss"]]
    for axis in AXES[:2]:
        drawn = series.get((axis, "lm loss"), [])
        if len(drawn) == len(iterations):
            series["iteration", f"consumed {axis}"] = [
                (n, where) for n, (where, _) in zip(iterations, drawn, strict=True)
            ]
