"""Charts of an evaluation: scores of all subjects with intervals and the level of chance; the needle test."""

import io
from collections.abc import Sequence
from math import sqrt
from typing import Any

from ascendspeed.evaluation.metrics import TaskScore

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")
LABEL_LENGTH = 40
"""Longest name of a subject in the chart."""
BAR, MARGINS = 0.19, 1.25
"""Inches of a bar with its gap, and of the title, legend and axis of a task."""
Z = 1.96
"""Standard deviations of a 95 % interval."""


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of `count` questions (Wilson 1927), which stays within 0 and 1."""
    scale = 1 + Z**2 / count
    center = (share + Z**2 / (2 * count)) / scale
    half = Z / scale * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def chance_level(score: TaskScore) -> float | None:
    """Returns the expected score of a random choice; None if answers are generated."""
    counts = [len(question.choices) for subject in score.benchmark.subjects for question in subject.questions]
    return sum(1 / count for count in counts) / len(counts) if counts and all(counts) else None


def draw_chart(scores: Sequence[TaskScore], title: str) -> bytes:
    """Returns a PNG with a plot for each task, see `_draw_task`."""
    from matplotlib.figure import Figure

    heights = [MARGINS + BAR * max(len(score.subjects), 2) for score in scores]
    figure = Figure(figsize=(8.5, sum(heights) + 0.4), dpi=110, layout="constrained")
    plots = figure.subplots(len(scores), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, score in zip(plots, scores, strict=True):
        _draw_task(axes, score)
    figure.suptitle(title, fontsize=9)
    return _png(figure)


def _draw_task(axes: Any, score: TaskScore) -> None:
    """Draws a bar for each subject in the color of its category, with its value and its interval, and lines
    at the macro mean and at the level of chance."""
    subjects = sorted((subject.info for subject in score.benchmark.subjects), key=lambda info: info.category)
    categories = list(dict.fromkeys(info.category for info in subjects))
    for position, info in enumerate(subjects):
        subject = score.subjects[info.name]
        share = subject.metrics[score.metric]
        low, high = (100 * value for value in wilson_interval(share, subject.questions))
        color = COLORS[categories.index(info.category) % len(COLORS)]
        axes.barh(position, 100 * share, height=0.7, color=color)
        axes.plot([low, high], [position, position], color="black", lw=0.8, alpha=0.6)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # above the lines of mean and chance
        label = axes.text(max(100 * share, high) + 0.8, position, f"{100 * share:.1f}", va="center", bbox=box)
        label.set(fontsize=6.5, zorder=3)
    handles = _category_handles(categories) if len(categories) > 1 else []
    macro, micro = (100 * score.groups["all"][kind] for kind in ("macro", "micro"))
    if len(subjects) > 1:
        handles.append(axes.axvline(macro, color="black", lw=0.9, ls="--", label=f"macro mean {macro:.1f}"))
    if (chance := chance_level(score)) is not None:
        label = f"chance {100 * chance:.0f}"
        handles.append(axes.axvline(100 * chance, color="#d62728", lw=0.9, ls=":", label=label))
    axes.plot([], [], color="black", lw=0.8, alpha=0.6, label="95 % interval")
    handles.append(axes.lines[-1])
    axes.set_yticks(range(len(subjects)), [_shorten(info.name) for info in subjects], fontsize=7)
    margin = 0.6 if len(subjects) > 1 else 0.9
    axes.set_ylim(len(subjects) - 1 + margin, -margin)  # the first subject at the top
    axes.set_xlim(0, 106)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(f"{score.metric} (%)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    means = f"macro {macro:.2f}, micro {micro:.2f}" if len(subjects) > 1 else f"{micro:.2f}"
    count = score.groups["all"]["questions"]
    noun = "question" if count == 1 else "questions"
    axes.set_title(f"{score.benchmark.name}: {means} ({count:,} {noun})", fontsize=9, pad=22)
    axes.legend(
        handles=handles,
        fontsize=7,
        ncols=len(handles),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
        columnspacing=1.2,
        handlelength=1.4,
    )


def _category_handles(categories: Sequence[str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=COLORS[i % len(COLORS)], label=category) for i, category in enumerate(categories)]


def _shorten(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"


def draw_needle_chart(
    lengths: Sequence[int], depths: Sequence[float], shares: Sequence[Sequence[float]], title: str
) -> bytes:
    """Returns a PNG: percent found, by length and depth."""
    from matplotlib.figure import Figure

    size = (max(5.0, 2.2 + 0.75 * len(lengths)), 2.1 + 0.42 * len(depths))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    percent = [[100 * share for share in row] for row in shares]
    image = axes.imshow(percent, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for row, values in enumerate(percent):
        for column, value in enumerate(values):
            color = "black" if 15 < value < 85 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.tick_params(axis="x", rotation=45 if len(lengths) > 4 else 0)
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths], fontsize=8)
    axes.set_xlabel("length of the prompt (tokens)", fontsize=8)
    axes.set_ylabel("depth of the needle", fontsize=8)
    figure.suptitle(title, fontsize=9)
    bar = figure.colorbar(image)
    bar.set_label("found (%)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return png.getvalue()
