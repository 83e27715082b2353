"""How fast a model answers: time to the first token and of each further one, as the tables that users of MindIE know. No torch."""

import csv
import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed.utils.atomic import replace_file
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

COLUMNS = (
    "batch",
    "input",
    "output",
    "total s",
    "first token ms",
    "other tokens ms",
    "other tokens/s",
    "tokens/s",
)


@dataclass(frozen=True)
class GenerationTiming:
    """One measurement: `batch` prompts of `inputs` tokens, `outputs` new tokens each."""

    batch: int
    inputs: int
    outputs: int
    total: float
    """Seconds for all tokens of the batch."""
    first: float
    """Seconds to the first token of the batch: reading the prompts."""

    @property
    def other(self) -> float:
        """Seconds of one further token, of all rows side by side; 0 where there is none."""
        return (self.total - self.first) / (self.outputs - 1) if self.outputs > 1 else 0.0

    @property
    def row(self) -> tuple[float, ...]:
        """In the order of `COLUMNS`."""
        decode = self.batch / self.other if self.other else 0.0
        speed = self.batch * self.outputs / self.total
        return (
            self.batch,
            self.inputs,
            self.outputs,
            self.total,
            self.first * 1e3,
            self.other * 1e3,
            decode,
            speed,
        )


class BatchOutOfMemory(Exception):
    """A batch that does not fit."""


class GenerationTimer:
    """Takes the times of a generation, asked at each new token of each row."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._begin, self._first = now, now(), 0.0

    def watch(self, row: int, token: int) -> bool:
        """For `generate.sample`: ends nothing."""
        if not self._first:
            self._first = self._now()
        return False

    def timing(self, batch: int, inputs: int, outputs: int) -> GenerationTiming:
        """After the last token."""
        return GenerationTiming(batch, inputs, outputs, self._now() - self._begin, self._first - self._begin)


def parse_pairs(text: str, what: str, least: int = 1) -> list[tuple[int, int]]:
    """`[[256,256],[512,512]]` -> pairs of numbers. Raises `UserError`."""
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    good = isinstance(said, list) and said and all(isinstance(pair, list) and len(pair) == 2 for pair in said)
    if not good or not all(type(number) is int and number >= least for pair in said for number in pair):
        raise UserError(
            f"{what} {text!r} is not a list of pairs of numbers from {least} on, such as [[256,256],[512,512]]"
        )
    return [(pair[0], pair[1]) for pair in said]


def largest_batch(
    low: int, high: int, limit: float, measure: Callable[[int], GenerationTiming]
) -> GenerationTiming | None:
    """The measurement of the largest batch in [low, high] whose further tokens take at most `limit` seconds; None: not even `low`.

    A binary search: times grow with the batch. Out of memory counts as too slow, and is said.
    """

    def fits(batch: int) -> GenerationTiming | None:
        try:
            found = measure(batch)
        except BatchOutOfMemory:
            logger.info(f"batch {batch}: out of memory")
            return None
        good = found.other <= limit
        logger.info(
            f"batch {batch}: {found.other * 1e3:.2f} ms per token, {'within' if good else 'above'} {limit * 1e3:g} ms"
        )
        return found if good else None

    best = fits(low)
    if best is None:
        return None
    while low < high:
        # Doubling first: a batch that is much too large would take long, or all memory.
        middle = min(low * 2, (low + high + 1) // 2)
        found = fits(middle)
        if found:
            low, best = middle, found
        else:
            high = middle - 1
    return best


def format_table(timings: Sequence[GenerationTiming]) -> str:
    """As text, columns aligned."""
    cells = [
        list(COLUMNS),
        *([f"{value:.0f}" if i < 3 else f"{value:.2f}" for i, value in enumerate(t.row)] for t in timings),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )


def to_csv(timings: Sequence[GenerationTiming]) -> str:
    """The same with all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(t.mapping for t in timings)
    return out.getvalue()


def plot_timings(timings: Sequence[GenerationTiming], title: str) -> bytes:
    """A PNG: time to the first token, time of the others and tokens/s, for each measurement."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=10)
    labels = [f"{t.inputs}+{t.outputs}\n× {t.batch}" for t in timings]
    axes: Any = figure.subplots(1, 3)
    for axis, column, color in zip(axes, (4, 5, 7), ("#1f77b4", "#d62728", "#2ca02c"), strict=True):
        bars = axis.bar(labels, [t.row[column] for t in timings], color=color)
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.set_title(COLUMNS[column], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", alpha=0.3)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()


def write_report(timings: Sequence[GenerationTiming], folder: Path, title: str) -> str:
    """performance.txt, .csv and .png in a folder, each as a whole; gives the text. Raises `UserError`."""
    text = f"{title}\n{format_table(timings)}\n"
    files = {"txt": text.encode(), "csv": to_csv(timings).encode(), "png": plot_timings(timings, title)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, data in files.items():
            replace_file(folder / f"performance.{kind}", data)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None
    return text
