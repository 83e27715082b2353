"""Reads the loss curve of a run from a console log, TensorBoard events, JSON lines, or the folder that
contains them.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascendspeed.loss_compare import console_logs
from ascendspeed.loss_compare.curve import (
    FIELD_NAMES,
    LoggedStep,
    LossCurve,
    SignificantDigits,
    drop_replaced_steps,
    normalize_name,
    parse_step,
)
from ascendspeed.utils import safe_io
from ascendspeed.utils.errors import UserError

EVENTS = "*tfevents*"
LOSS_NAMES = {name for name, (field, _) in FIELD_NAMES.items() if field == "loss"}
RUN_LOSS_NAMES = {"train loss", "training loss"}
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_log(path: str | Path) -> LossCurve:
    """Reads a log with at least one loss. Raises UserError if it cannot be read or has none."""
    log = _find_log(Path(path))
    curve = _parse(log)
    if not any(step.loss is not None for step in curve.steps):
        raise UserError(
            f"{log}: no training loss in this log; known are console logs of this project, Megatron-LM, "
            "AscendSpeed, MindSpeed, InternEvo, GPT-NeoX and DeepSpeed's pipeline engine (DeepSpeed's lines "
            "`step=N, skipped=, lr=` have no loss), TensorBoard events and JSON lines"
        )
    folder = log if log.is_dir() else log.parent
    if curve.config is None and (folder / "run.json").is_file():
        return replace(curve, config=safe_io.read_json_object(folder / "run.json"))
    return curve


def _find_log(path: Path) -> Path:
    """Returns the log in a folder: its train.log, else the folder itself for its TensorBoard events."""
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


def _parse(path: Path) -> LossCurve:
    if path.is_dir() or path.match(EVENTS):
        from ascendspeed.loss_compare import tensorboard

        return tensorboard.read_events(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) in UTF16:
                raise UserError(
                    f"{path} is UTF-16, as PowerShell's `>` writes it: iconv -f UTF-16 -t UTF-8 makes it "
                    "readable"
                )
        with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
            first_line = lines.readline()
            lines.seek(0)
            if first_line.lstrip().startswith("{"):
                return _parse_json_lines(path, lines)
            return console_logs.parse_console_log(str(path), lines)
    except OSError as error:
        raise UserError(f"{path}: cannot read this log: {error.strerror}") from error


def _parse_json_lines(path: Path, lines: Iterator[str]) -> LossCurve:
    records = [
        (number, record)
        for number, record in _json_records(path, lines)
        if record.keys() & LOSS_NAMES and not _is_summary(record)
    ]
    # Beside losses of steps, `train_loss` is the mean over the run.
    step_losses = [
        (number, record) for number, record in records if record.keys() & LOSS_NAMES - RUN_LOSS_NAMES
    ]
    steps: list[LoggedStep] = []
    digits = SignificantDigits()
    for number, record in step_losses or records:
        step = parse_step(record)
        if step is None:
            continue
        last = steps[-1] if steps else None
        if (
            last
            and last.position == step.position
            and (last.loss, last.grad_norm) != (step.loss, step.grad_norm)
        ):
            raise UserError(
                f"{path}: line {number} repeats step {step.position} with another loss or norm: which one "
                "counts?"
            )
        digits.count(record)
        steps.append(step)
    run_steps, replaced = drop_replaced_steps(steps)
    return LossCurve(str(path), "JSON lines", run_steps, digits=digits.by_field, replaced=replaced)


def _json_records(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and values of every line, by normalized names; skips a last line that is cut off."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = safe_io.parse_json(line.encode(), finite=False)  # the verdict handles a NaN loss
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if not line.endswith("\n"):
                return
            raise UserError(f"{path}: line {number} is not valid JSON of a log: {error}") from None
        yield (
            number,
            {normalize_name(name): value for name, value in record.items() if not isinstance(value, bool)},
        )


def _is_summary(record: dict[str, Any]) -> bool:
    """True for Hugging Face's last line, about the whole run, and for evaluations."""
    return "train runtime" in record or "train" not in str(record.get("split", "train")).lower()
