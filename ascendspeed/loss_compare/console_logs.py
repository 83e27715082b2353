"""Parser of console logs, in any of the line formats of `line_formats`."""

import json
import re
from collections.abc import Iterable
from typing import Any

from ascendspeed.loss_compare.curve import (
    LoggedStep,
    LossCurve,
    SignificantDigits,
    drop_replaced_steps,
    parse_step,
)
from ascendspeed.loss_compare.line_formats import LINE_FORMATS, without_colors
from ascendspeed.utils.errors import UserError

_RUN = re.compile(r"(?:^|\s)run: (\{.*\})\s*$")
_DEVICE = re.compile(r"(?:^|\s)device: (\w.*\d+ processes.*)$")
_ARGUMENT = re.compile(r"^\s*(?:\S+:\s+)?(\w+) \.{3,} (.*?)\s*$")


class _Steps:
    """Steps of one line format, in the order of the log."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps: list[LoggedStep] = []
        self.digits = SignificantDigits()
        self._since_restart: dict[int, LoggedStep] = {}
        self._immediate_repeats = 0

    def add(self, fields: dict[str, str], number: int, after_other_text: bool) -> bool:
        """Adds the step of a line; False if it is not one.

        `after_other_text`: other lines precede it, as a program writes them when it starts again. Raises
        UserError if a position occurs twice with different values without such a restart.
        """
        step = parse_step(fields) or parse_step(fields | {"log entry": len(self.steps) + 1})
        if step is None or (step.entry and step.loss is None):
            return False
        last = self.steps[-1] if self.steps else None
        if after_other_text and last and step.position <= last.position:
            self._since_restart = {}
            self._immediate_repeats += step.position == last.position and _differ(step, last)
        earlier = self._since_restart.get(step.position)
        if (earlier and _differ(earlier, step)) or self._immediate_repeats > 2:
            raise UserError(
                f"{self.path}: line {number} repeats step {step.position} with another loss or norm "
                f"({_values(step)}; before: {_values(earlier or last)}): two runs or several ranks in one "
                "log? Keep the lines of one"
            )
        if step.entry and last and (step.epoch or 0) < (last.epoch or 0):
            raise UserError(
                f"{self.path}: at line {number} the epoch goes back from {last.epoch} to {step.epoch}, and "
                "these lines have no step number: give trainer_state.json of the resumed run instead"
            )
        self._since_restart[step.position] = step
        self.steps.append(step)
        self.digits.count(fields)
        return True


def _differ(a: LoggedStep, b: LoggedStep) -> bool:
    return (str(a.loss), str(a.grad_norm)) != (str(b.loss), str(b.grad_norm))  # as text: nan equals nan


def _values(step: LoggedStep) -> str:
    return f"loss {step.loss}" + ("" if step.grad_norm is None else f", norm {step.grad_norm}")


def parse_console_log(path: str, lines: Iterable[str]) -> LossCurve:
    """Parses a console log in the first format that has a loss; the curve has no steps if none has."""
    by_format = {kind: _Steps(path) for kind in LINE_FORMATS}
    config: dict[str, Any] | None = None
    arguments: dict[str, str] = {}
    device = None
    after_other_text = False
    for number, text in enumerate(lines, 1):
        line = without_colors(text)
        kind = next((kind for kind, split in LINE_FORMATS.items() if (fields := split(line))), None)
        if kind and by_format[kind].add(fields, number, after_other_text):
            after_other_text = False
            continue
        after_other_text = after_other_text or bool(line.strip())
        if match := _RUN.search(line):
            config = _json_object(match[1]) or config
        elif match := _DEVICE.search(line):
            device = match[1].strip()
        elif match := _ARGUMENT.match(line):
            arguments[match[1]] = match[2]
    kind = next((k for k, s in by_format.items() if any(step.loss is not None for step in s.steps)), None)
    if kind is None:
        return LossCurve(path, "console log", (), config or arguments or None, device)
    run_steps, replaced = drop_replaced_steps(by_format[kind].steps)
    digits = by_format[kind].digits.by_field
    return LossCurve(path, kind, run_steps, config or arguments or None, device, digits, replaced)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
