"""Renders the page of a run (`run.html`), alone or beside another run."""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascendspeed.loss_compare.page_template import STYLE, environment
from ascendspeed.run_report.run_log import RunLog, read_run
from ascendspeed.run_report.svg_chart import Series, draw_chart
from ascendspeed.training.metric_lines import MetricsLine
from ascendspeed.training.profile_summary import FOLDER, SUMMARY_NAME
from ascendspeed.utils.atomic import write_file
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

TEMPLATE = Path(__file__).with_name("page.html")
PAGE_NAME = "run.html"
REFRESH_SECONDS = 30
"""Shortest time between two pages of a run that goes on."""
COST_SHARE = 0.01
"""Largest share of the time that writing the page may take."""
MOST_EVENTS = 200
CHARTS = (
    ("lr", "learning rate", "", 1.0),
    ("grad_norm", "gradient norm", "", 1.0),
    ("tokens_per_s", "tokens/s per device", "", 1.0),
    ("mfu", "MFU", "%", 100.0),
    ("tflops", "TFLOP/s per device", "", 1.0),
    ("memory_gib", "peak memory", "GiB", 1.0),
    ("loss_scale", "loss scale", "", 1.0),
)
"""Field of a log line, title, unit, factor."""


def render(run: RunLog, against: RunLog | None = None, is_final: bool = True) -> str:
    """Returns the page: self-contained HTML without scripts."""
    runs = [run] if against is None else [run, against]
    settings = {name: _text(value) for name, value in run.settings.items()}
    template = environment(TEMPLATE.parent).get_template(TEMPLATE.name)
    return template.render(
        title=_title(run, is_final),
        style=STYLE.read_text("utf-8"),
        is_final=is_final,
        refresh_seconds=None if is_final else REFRESH_SECONDS,
        errors=run.errors,
        summary=_summary(run),
        charts=_charts(runs),
        events=run.events[-MOST_EVENTS:],
        checkpoints=run.checkpoints,
        evaluations=run.evaluations,
        profile=_profile(run.path.parent),
        scores=run.scores,
        against=str(against.path.parent) if against else None,
        differing=differences(run, against) if against else [],
        settings=list(settings.items()),
    )


def differences(run: RunLog, against: RunLog) -> list[tuple[str, str | None, str | None]]:
    """(setting, value, value of the other run) of settings and environment that differ."""
    ours, theirs = run.settings | run.facts, against.settings | against.facts
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        (name, _optional(ours, name), _optional(theirs, name))
        for name in names
        if ours.get(name) != theirs.get(name) or (name in ours) != (name in theirs)
    ]


def write_page(path: Path, run: RunLog, against: RunLog | None = None, is_final: bool = True) -> None:
    """Writes the page; it appears whole."""
    write_file(path, render(run, against, is_final))


class RunPage:
    """Refreshes run.html beside the log while a run goes on, and writes the final one at its end."""

    def __init__(self, log_dir: str | Path) -> None:
        self._folder = Path(log_dir)
        self._next = 0.0

    def write(self, line: MetricsLine) -> None:
        """Writes the page if it is due: at most every `REFRESH_SECONDS`, and for `COST_SHARE` of the time."""
        began = time.monotonic()
        if began < self._next:
            return
        self._refresh(is_final=False)
        seconds = time.monotonic() - began
        self._next = began + max(REFRESH_SECONDS, seconds / COST_SHARE)

    def close(self) -> None:
        """Writes the final page."""
        self._refresh(is_final=True)

    def _refresh(self, is_final: bool) -> None:
        with contextlib.suppress(UserError):  # no iteration yet
            write_page(self._folder / PAGE_NAME, read_run(self._folder), is_final=is_final)


def _charts(runs: Sequence[RunLog]) -> list[str]:
    """SVG of every chart that has values."""
    names = ["this run", "the other run"] if len(runs) > 1 else [""]
    losses = []
    for name, run in zip(names, runs, strict=True):
        losses.append(Series(f"training {name}".strip(), _points(run, "loss"), smoothed=True))
    for name, run in zip(names, runs, strict=True):
        points = [(line.iteration, line.loss) for line in run.evaluations if line.split == "validation"]
        losses.append(Series(f"validation {name}".strip(), points))
    charts = [draw_chart("loss", losses), *_score_charts(runs, names)]
    for field, title, unit, factor in CHARTS:
        series = [Series(name, _points(run, field, factor)) for name, run in zip(names, runs, strict=True)]
        charts.append(draw_chart(title, series, unit))
    return [chart for chart in charts if chart]


def _score_charts(runs: Sequence[RunLog], names: Sequence[str]) -> list[str]:
    """A chart of every benchmark that was scored more than once."""
    tasks = dict.fromkeys((line.task, line.metric) for line in runs[0].scores)
    charts = []
    for task, metric in tasks:
        series = [
            Series(name, [(line.iteration, line.score) for line in run.scores if line.task == task])
            for name, run in zip(names, runs, strict=True)
        ]
        charts.append(draw_chart(f"{task}: {metric}", series))
    return charts


def _points(run: RunLog, name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    values = [(line.iteration, getattr(line, name)) for line in run.train]
    return [(x, value * factor) for x, value in values if value is not None]


def _profile(folder: Path) -> dict[str, Any] | None:
    """Summary of --profile; None if there is none."""
    with contextlib.suppress(UserError):
        return read_json_object(folder / FOLDER / SUMMARY_NAME)
    return None


def _title(run: RunLog, is_final: bool) -> str:
    last = run.train[-1]
    state = "stopped with an error" if run.errors else "finished" if is_final else "running"
    if is_final and not run.errors and last.iteration < last.train_iters:
        state = "stopped"
    return f"{run.path.parent}: {state} at iteration {last.iteration} of {last.train_iters}"


def _summary(run: RunLog) -> list[tuple[str, str]]:
    last = run.train[-1]
    skipped = sum(line.skipped or 0 for line in run.train)
    rows = [
        ("iterations", f"{last.iteration} of {last.train_iters}; {skipped} skipped"),
        ("tokens", f"{last.tokens:,}" if last.tokens is not None else ""),
        ("last loss", "" if last.loss is None or math.isnan(last.loss) else f"{last.loss:.6f}"),
        ("last line", last.time),
        *run.facts.items(),
        ("log", str(run.path)),
    ]
    return [(name, value) for name, value in rows if value]


def _optional(values: dict[str, Any], name: str) -> str | None:
    return _text(values[name]) if name in values else None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)
