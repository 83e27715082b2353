"""Metrics of a run as JSON lines beside its log: `metrics.jsonl`, one object per log line."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from ascendspeed.training.metric_lines import MetricsLine, ScoreLine
from ascendspeed.utils.atomic import write_file
from ascendspeed.utils.errors import UserError

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends one line at a time by a single write; a resumed run first removes what it will repeat."""

    def __init__(self, folder: str | Path, step: int) -> None:
        """`step`: iteration that the run continues after; 0 keeps the file of an earlier run by a number.

        Raises UserError if the file cannot be written.
        """
        self._path = Path(folder, NAME)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _keep_older(self._path) if step == 0 else _drop_after(self._path, step)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror}; choose another --log-dir") from error

    def write(self, line: MetricsLine) -> None:
        """Appends a line."""
        text = json.dumps(as_json(line), separators=(", ", ": ")) + "\n"
        os.write(self._file, text.encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def as_json(line: MetricsLine) -> dict[str, Any]:
    """Values of a line; `split` says which loss it is, or "score". A number that is not finite is null."""
    values = {"split": "score" if isinstance(line, ScoreLine) else "train", **dataclasses.asdict(line)}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
        if value is not None
    }


def _keep_older(path: Path) -> None:
    """Renames the file of an earlier run to metrics-1.jsonl, -2 ..."""
    number = 1
    while (older := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(older)


def _drop_after(path: Path, step: int) -> None:
    """Removes lines of iterations after `step`, and one that was cut off."""
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(text)["iteration"] <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_file(path, "".join(kept))
