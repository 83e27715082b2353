"""Reads everything a run's page shows from its train.log."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendspeed.training.metric_lines import EvalLine, ScoreLine, TrainLine, parse_line
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.run_record import LOG_NAME

SKIPPED = re.compile(r"^ ?iteration (\d+) skipped, nothing was updated: (.*)")
SPIKE = re.compile(r"iteration (\d+): the loss (\S+ is a spike, .*)")
SAVED = re.compile(r"^ saved (.+?) in ([\d.]+) s(?:, of which training stood still for ([\d.]+) s)?$")
FACTS = ("start", "device", "kernels")
"""First words of the lines that describe the environment."""


@dataclass(frozen=True)
class Event:
    """A skipped iteration or a loss spike."""

    iteration: int
    kind: str
    text: str
    """Cause, ranks and samples."""


@dataclass(frozen=True)
class LoggedCheckpoint:
    """A checkpoint that the run has written."""

    path: str
    seconds: float
    stall: float
    """Seconds in which training stood still."""
    size: int | None
    """Bytes; None if the folder is no longer there."""


@dataclass
class RunLog:
    """Content of a log; a resumed run replaces the lines after its checkpoint."""

    path: Path
    train: list[TrainLine] = field(default_factory=list)
    evaluations: list[EvalLine] = field(default_factory=list)
    scores: list[ScoreLine] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    checkpoints: list[LoggedCheckpoint] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Flat: `train.lr` -> value."""
    errors: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Adds a line of the log."""
        line = parse_line(text)
        if isinstance(line, TrainLine):
            self._drop_from(line.iteration)
            self.train.append(line)
        elif isinstance(line, EvalLine):
            self.evaluations.append(line)
        elif isinstance(line, ScoreLine):
            self.scores.append(line)
        elif match := SKIPPED.match(text):
            self.events.append(Event(int(match[1]), "skipped", match[2]))
        elif match := SPIKE.search(text):
            self.events.append(Event(int(match[1]), "spike", match[2]))
        elif match := SAVED.match(text):
            size = _size_of(Path(match[1]))
            self.checkpoints.append(
                LoggedCheckpoint(match[1], float(match[2]), float(match[3] or match[2]), size)
            )
        elif text.startswith("error: "):
            self.errors.append(text)
        else:
            self._add_fact(text)

    def _add_fact(self, text: str) -> None:
        name, colon, value = text.partition(": ")
        if colon and name == "start":
            self.errors.clear()  # of an earlier attempt
        if colon and name in FACTS:
            self.facts[name] = value
        elif colon and name == "run" and value.startswith("{"):
            try:
                self.settings = flatten(json.loads(value))
            except (ValueError, RecursionError):
                self.settings = {}

    def _drop_from(self, iteration: int) -> None:
        """Removes what a resumed run repeats."""
        if not self.train or self.train[-1].iteration < iteration:
            return
        self.train = [line for line in self.train if line.iteration < iteration]
        self.evaluations = [line for line in self.evaluations if line.iteration < iteration]
        self.scores = [line for line in self.scores if line.iteration < iteration]
        self.events = [event for event in self.events if event.iteration < iteration]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` -> `{"train.lr": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def read_run(path: str | Path) -> RunLog:
    """Reads a train.log, or the one in a folder. Raises UserError without a line of training."""
    file = Path(path)
    file = file / LOG_NAME if file.is_dir() else file
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            log = parse(file, lines)
    except OSError as error:
        raise UserError(f"{file}: cannot read this log: {error.strerror}; give a --log-dir") from error
    if not log.train:
        raise UserError(f"{file}: no line of a training iteration; it is not the log of a run")
    return log


def parse(path: Path, lines: Iterable[str]) -> RunLog:
    """Reads the lines of a log."""
    log = RunLog(path)
    for line in lines:
        log.add(line.rstrip("\n"))
    return log


def _size_of(folder: Path) -> int | None:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) or None
    except OSError:
        return None
