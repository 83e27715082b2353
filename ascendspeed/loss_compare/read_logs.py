"""A path -> the curve of its run: console logs, TensorBoard events, JSON lines, or the folder that holds them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascendspeed.loss_compare import console_logs
from ascendspeed.loss_compare.curve import NAMES, Curve, Digits, Step, continuous, normal, step_of
from ascendspeed.utils import safe_io
from ascendspeed.utils.errors import UserError

EVENTS = "*tfevents*"
LOSSES = {name for name, (field, _) in NAMES.items() if field == "loss"}
RUN_LOSSES = {"train loss", "training loss"}
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read(path: str | Path) -> Curve:
    """The curve that a log holds: at least one step with a loss. Raises `UserError` when it cannot be read or has none."""
    place = _find(Path(path))
    curve = _open(place)
    if not any(step.loss is not None for step in curve.steps):
        raise UserError(
            f"{place}: no training loss in this log; known are console logs of this project, Megatron-LM, AscendSpeed, MindSpeed, "
            "InternEvo, GPT-NeoX and DeepSpeed's pipeline engine (DeepSpeed's lines `step=N, skipped=, lr=` hold no loss), "
            "TensorBoard events and JSON lines"
        )
    beside = place if place.is_dir() else place.parent
    if curve.config is None and (beside / "run.json").is_file():
        return replace(curve, config=safe_io.read_table(beside / "run.json"))
    return curve


def _find(path: Path) -> Path:
    """The log in a folder: its train.log, else its TensorBoard events."""
    if not path.exists():
        raise UserError(f"{path}: there is no such log")
    if path.is_dir():
        if (path / "train.log").is_file():
            return path / "train.log"
        if not any(path.glob(EVENTS)):
            raise UserError(
                f"{path}: neither train.log nor TensorBoard events in this folder; name the log itself"
            )
    return path


def _open(path: Path) -> Curve:
    if path.is_dir() or path.match(EVENTS):
        from ascendspeed.loss_compare import tensorboard

        return tensorboard.read(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) in UTF16:
                raise UserError(
                    f"{path} is UTF-16, as PowerShell's `>` writes it: iconv -f UTF-16 -t UTF-8 makes it readable"
                )
        with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
            first = lines.readline()
            lines.seek(0)
            return (
                _json_lines(path, lines)
                if first.lstrip().startswith("{")
                else console_logs.read(str(path), lines)
            )
    except OSError as error:
        raise UserError(f"{path}: cannot read this log: {error.strerror}") from error


def _json_lines(path: Path, lines: Iterator[str]) -> Curve:
    tables = [
        (count, said)
        for count, said in _tables(path, lines)
        if said.keys() & LOSSES and not _of_no_step(said)
    ]
    if any(
        said.keys() & LOSSES - RUN_LOSSES for _, said in tables
    ):  # beside losses of steps, `train_loss` is that of the run
        tables = [(count, said) for count, said in tables if said.keys() & LOSSES - RUN_LOSSES]
    steps: list[Step] = []
    digits = Digits()
    for count, said in tables:
        if (step := step_of(said)) is None:
            continue
        last = steps[-1] if steps else None
        if last and last.place == step.place and (last.loss, last.grad_norm) != (step.loss, step.grad_norm):
            raise UserError(
                f"{path}: line {count} says step {step.place} once more, with another loss or norm: which one counts?"
            )
        digits.count(said)
        steps.append(step)
    kept, replaced = continuous(steps)
    return Curve(str(path), "JSON lines", kept, digits=digits.found, replaced=replaced)


def _tables(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of every line, by normal names; a last line that is cut off is none."""
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            said = safe_io.parse_json(
                line.encode(), finite=False
            )  # a loss may be NaN: that is for the verdict
            if not isinstance(said, dict):
                raise ValueError("not a table of names and values")
        except ValueError as error:
            if not line.endswith("\n"):
                return
            raise UserError(f"{path}: line {count} is no JSON that can be used: {error}") from None
        yield count, {normal(name): value for name, value in said.items() if not isinstance(value, bool)}


def _of_no_step(said: dict[str, Any]) -> bool:
    """Hugging Face's last line, about the whole run; or an evaluation."""
    return "train runtime" in said or "train" not in str(said.get("split", "train")).lower()
