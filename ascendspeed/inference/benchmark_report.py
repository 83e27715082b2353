"""Report of the generation benchmark: time to the first token and per further token, as MindIE's tables.

No torch.
"""

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
PLOTS = (
    (4, "ms to the first token", "#1f77b4"),
    (5, "ms per further token", "#d62728"),
    (7, "tokens/s of the whole batch", "#2ca02c"),
)
"""Index in `COLUMNS`, title and color of each plot."""


@dataclass(frozen=True)
class GenerationTiming:
    """A measurement: `batch` prompts of `inputs` tokens with `outputs` new tokens each."""

    batch: int
    inputs: int
    outputs: int
    total: float
    """Seconds for all tokens of the batch."""
    first: float
    """Seconds to the first token of the batch: prefill."""

    @property
    def decode_step(self) -> float:
        """Seconds of a decoding step of the batch; 0 if there is none."""
        return (self.total - self.first) / (self.outputs - 1) if self.outputs > 1 else 0.0

    @property
    def row(self) -> tuple[float, ...]:
        """Values of `COLUMNS`."""
        decode_speed = self.batch / self.decode_step if self.decode_step else 0.0
        speed = self.batch * self.outputs / self.total
        return (
            self.batch,
            self.inputs,
            self.outputs,
            self.total,
            self.first * 1e3,
            self.decode_step * 1e3,
            decode_speed,
            speed,
        )


class BatchOutOfMemory(Exception):
    """Raised when a batch does not fit into memory."""


class GenerationTimer:
    """Measures a generation from its construction; `on_token` is the stop callback of `engine.sample`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._first = 0.0

    def on_token(self, row: int, token: int) -> bool:
        """Records the time of the first token; never ends a row."""
        if not self._first:
            self._first = self._now()
        return False

    def timing(self, batch: int, inputs: int, outputs: int) -> GenerationTiming:
        """Returns the measurement; call it after the last token."""
        return GenerationTiming(batch, inputs, outputs, self._now() - self._start, self._first - self._start)


def parse_pairs(text: str, flag: str, least: int = 1) -> list[tuple[int, int]]:
    """Parses `[[256,256],[512,512]]`. Raises `UserError`, naming the flag."""
    try:
        pairs = json.loads(text)
    except ValueError:
        pairs = None
    valid = isinstance(pairs, list) and bool(pairs) and all(_is_pair(pair, least) for pair in pairs)
    if not valid:
        raise UserError(
            f"{flag} {text!r} is not a list of pairs of integers of at least {least}, "
            "such as [[256,256],[512,512]]"
        )
    return [(pair[0], pair[1]) for pair in pairs]


def _is_pair(pair: Any, least: int) -> bool:
    is_pair = isinstance(pair, list) and len(pair) == 2
    return is_pair and all(type(number) is int and number >= least for number in pair)


def find_largest_batch(
    low: int, high: int, limit: float, measure: Callable[[int], GenerationTiming]
) -> GenerationTiming | None:
    """Returns the timing of the largest batch in [low, high] whose decoding step takes at most `limit`
    seconds.

    None if not even `low` does. Doubling, then binary search, as times grow with the batch. A batch that is
    out of memory counts as too slow.
    """

    def measure_within_limit(batch: int) -> GenerationTiming | None:
        try:
            timing = measure(batch)
        except BatchOutOfMemory:
            logger.info(f"batch {batch}: out of memory")
            return None
        is_within = timing.decode_step <= limit
        relation = "within" if is_within else "above"
        logger.info(
            f"batch {batch}: {timing.decode_step * 1e3:.2f} ms per token, {relation} {limit * 1e3:g} ms"
        )
        return timing if is_within else None

    best = measure_within_limit(low)
    if best is None:
        return None
    while low < high:
        # Doubling first: a batch that is much too large takes long, or all memory.
        middle = min(low * 2, (low + high + 1) // 2)
        timing = measure_within_limit(middle)
        if timing:
            low, best = middle, timing
        else:
            high = middle - 1
    return best


def format_table(timings: Sequence[GenerationTiming]) -> str:
    """Formats the timings as text with aligned columns."""
    cells = [list(COLUMNS)]
    for timing in timings:
        cells.append([f"{value:.0f}" if i < 3 else f"{value:.2f}" for i, value in enumerate(timing.row)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )


def to_csv(timings: Sequence[GenerationTiming]) -> str:
    """Formats the timings as CSV with all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(timing.row for timing in timings)
    return out.getvalue()


def plot_timings(timings: Sequence[GenerationTiming], title: str) -> bytes:
    """Draws time to the first token, time per further token and tokens/s as bars; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("tokens of the prompt + of the answer × prompts in the batch", fontsize=8)
    labels = [f"{t.inputs:,}\n+ {t.outputs:,}\n× {t.batch:,}" for t in timings]
    axes: Any = figure.subplots(1, 3)
    for axis, (column, heading, color) in zip(axes, PLOTS, strict=True):
        bars = axis.bar(range(len(timings)), [t.row[column] for t in timings], width=0.6, color=color)
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.set_title(heading, fontsize=9)
        axis.set_xticks(range(len(timings)), labels)
        margin = 0.6 if len(timings) > 1 else 1
        axis.set_xlim(-margin, len(timings) - 1 + margin)
        axis.margins(y=0.12)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()


def write_report(timings: Sequence[GenerationTiming], folder: Path, title: str) -> str:
    """Writes performance.txt, .csv and .png, each atomically; returns the text. Raises `UserError`."""
    text = f"{title}\n{format_table(timings)}\n"
    files = {"txt": text.encode(), "csv": to_csv(timings).encode(), "png": plot_timings(timings, title)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, data in files.items():
            replace_file(folder / f"performance.{kind}", data)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error.strerror}") from None
    return text
