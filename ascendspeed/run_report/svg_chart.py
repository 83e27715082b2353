"""Line charts as SVG: raw values, a smoothed curve above them, axes with round numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 26, 30
MOST_POINTS = 800
"""Points of a curve that are drawn; of more, every n-th."""
SMOOTHING = 0.9
"""Share of the earlier values in the moving average."""
COLORS = ("#1f77b4", "#d62728", "#2a8a3e", "#9467bd")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    label: str
    points: Points
    smoothed: bool = False
    """Draw the moving average, and the values faintly."""


def smooth(points: Points, share: float = SMOOTHING) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    average = 0.0
    weight = 0.0
    smoothed = []
    for x, y in points:
        average = share * average + (1 - share) * y
        weight = share * weight + (1 - share)
        smoothed.append((x, average / weight))
    return smoothed


def draw_chart(title: str, series: Sequence[Series], unit: str = "") -> str:
    """Returns an SVG element; empty without a finite value."""
    drawn = [Series(s.label, _thin(_finite(s.points)), s.smoothed) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = _range_values(drawn)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    frame = _Frame(min(xs), max(xs), low, high)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="16" class="t">{escape(title)}{f" ({escape(unit)})" if unit else ""}</text>',
    ]
    for y in y_ticks:
        parts.append(f'<path d="M{LEFT} {frame.y(y)}H{WIDTH - RIGHT}" class="g"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{frame.y(y) + 4}" class="y">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{frame.x(x)}" y="{HEIGHT - 10}" class="x">{_number(x)}</text>')
    for i, s in enumerate(drawn):
        parts += _curve(s, COLORS[i % len(COLORS)], frame)
    parts += _legend(drawn) if len(drawn) > 1 else []
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Frame:
    """Maps values to pixels; a single value of all points is in the middle of the height."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        height = self.y_high - self.y_low
        share = (value - self.y_low) / height if height else 0.5
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _curve(series: Series, color: str, frame: _Frame) -> list[str]:
    """The polyline of a series, a dot for a single value."""

    def line(points: Points, style: str) -> str:
        if len(points) == 1:
            x, y = points[0]
            return f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="3" fill="{color}"/>'
        text = " ".join(f"{frame.x(x)},{min(max(frame.y(y), TOP), HEIGHT - BOTTOM)}" for x, y in points)
        return f'<polyline points="{text}" fill="none" stroke="{color}" {style}/>'

    if not series.smoothed:
        return [line(series.points, 'stroke-width="1.4"')]
    faint = line(series.points, 'stroke-width="1" opacity="0.3"')
    return [faint, line(smooth(series.points), 'stroke-width="1.6"')]


def _legend(series: Sequence[Series]) -> list[str]:
    parts = []
    for i, s in enumerate(series):
        y = TOP + 6 + 15 * i
        x = WIDTH - RIGHT - 8
        text = (
            f'<text x="{x}" y="{y + 4}" class="l" fill="{COLORS[i % len(COLORS)]}">{escape(s.label)}</text>'
        )
        parts.append(text)
    return parts


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range_values(series: Sequence[Series]) -> list[float]:
    """Values that decide the range of the axis: without the highest hundredth, which flattens the rest."""
    values = sorted(y for s in series for _, y in s.points)
    cut = values[: max(1, math.ceil(len(values) * 0.99))] if len(values) > 100 else values
    return cut


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point, and the last."""
    stride = -(-len(points) // MOST_POINTS)
    return [*points[:-1:stride], points[-1]] if stride > 1 else list(points)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2g}"
