"""Readers of logs that are records: JSON lines, the Trainer's trainer_state.json, CSV exported by W&B."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
from ascendspeed.utils.text import shorten_list

LOSS_NAMES = {name for name, (field, _) in FIELD_NAMES.items() if field == "loss"}
RUN_LOSS_NAMES = {"train loss", "training loss"}

Record = dict[str, Any]
"""Normalized name -> value."""


def read_records(path: Path, text: str) -> LossCurve | None:
    """Reads JSON: one object per line, trainer_state.json, or an array of records; None for other text.

    Skips a last line that is cut off. Raises UserError for a damaged line, and for JSON that is no log.
    """
    first_line = text.lstrip().partition("\n")[0]
    if not first_line.startswith(("{", "[")):
        return None
    whole = _parse(text)
    if isinstance(whole, dict) and "log_history" in whole:
        return _read_list(path, whole["log_history"], "trainer_state.json")
    if isinstance(whole, list) and first_line.lstrip("[ ")[:1] in ("", "{"):
        return _read_list(path, whole, "JSON array")
    if isinstance(whole, dict) and not isinstance(_parse(first_line), dict):
        raise UserError(
            f"{path}: this JSON is no log: it has no log_history, as trainer_state.json of Hugging Face's "
            "Trainer does; logs of one JSON object per line are read too"
        )
    if first_line.startswith('{"') or isinstance(_parse(first_line), dict):
        return _curve(path, _json_records(path, text.splitlines(keepends=True)), "JSON lines")
    return None  # a console log whose first line begins with a bracket


def _parse(text: str) -> Any:
    """Parses JSON; None for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_list(path: Path, entries: Any, kind: str) -> LossCurve:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: its entries are not JSON objects: this is no log")
    return _curve(path, ((n, _normalize(entry)) for n, entry in enumerate(entries, 1)), kind, "entry")


def is_csv(first_line: str) -> bool:
    """True for a header with a column of steps and one of losses."""
    columns = next(csv.reader([first_line]), [])
    names = {_column_name(column) for column in columns}
    return len(columns) > 1 and "step" in names and bool(names & LOSS_NAMES)


def read_csv(path: Path, lines: Iterable[str]) -> LossCurve:
    """Reads `Step,RUN - train/loss,RUN - train/loss__MIN,...`, as W&B exports it, or plain columns.

    Raises UserError for several runs, or a row that does not fit the header.
    """
    rows = csv.reader(lines, strict=True)
    header = next(rows)
    names = ["" if column.endswith(("__MIN", "__MAX")) else _column_name(column) for column in header]
    losses = [column for column, name in zip(header, names, strict=True) if name in LOSS_NAMES]
    if len(losses) > 1:
        raise UserError(
            f"{path} has several columns with a loss ({shorten_list(losses, 5)}): export the chart of one run"
        )
    records = []
    try:
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                raise UserError(f"{path}: row {number} has {len(row)} cells, the header {len(header)}")
            records.append((number, {name: cell for name, cell in zip(names, row, strict=True) if name}))
    except csv.Error as error:
        raise UserError(f"{path}: near row {len(records) + 2}: {error}") from None
    return _curve(path, ((n, record) for n, record in records if any(record.values())), "CSV", "row")


def _column_name(column: str) -> str:
    """Normalizes `RUN - train/loss` to `loss`, and `train/global_step` to `step`."""
    name = normalize_name(column.rpartition(" - ")[2].rpartition("/")[2])
    return "step" if name == "global step" else name


def _normalize(record: Record) -> Record:
    return {normalize_name(name): value for name, value in record.items() if not isinstance(value, bool)}


def _curve(path: Path, records: Iterable[tuple[int, Record]], kind: str, unit: str = "line") -> LossCurve:
    with_loss = [
        (n, record) for n, record in records if record.keys() & LOSS_NAMES and not _is_summary(record)
    ]
    # Beside losses of steps, `train_loss` is the mean over the run.
    of_steps = [(n, record) for n, record in with_loss if record.keys() & LOSS_NAMES - RUN_LOSS_NAMES]
    steps: list[LoggedStep] = []
    digits = SignificantDigits()
    for number, record in of_steps or with_loss:
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
                f"{path}: {unit} {number} repeats step {step.position} with another loss or norm: which one "
                "counts?"
            )
        digits.count(record)
        steps.append(step)
    run_steps, replaced = drop_replaced_steps(steps)
    return LossCurve(str(path), kind, run_steps, digits=digits.by_field, replaced=replaced)


def _json_records(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Record]]:
    """Yields number and values of every line."""
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
        yield number, _normalize(record)


def _is_summary(record: Record) -> bool:
    """True for Hugging Face's last line, about the whole run, and for evaluations."""
    return "train runtime" in record or "train" not in str(record.get("split", "train")).lower()
