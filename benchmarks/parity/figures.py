"""How far a run is from its reference, what the bounds are, and whether it is within them. No processes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.parity.reference import Curve, Named, Trained

LOSS, NORM, WEIGHT = 1e-5, 1e-5, 1e-3
"""Bounds of fp32: relative differences of losses and of gradient norms; a weight's difference as a share of the longest way that
it could have gone, the sum of the learning rates. Adam divides a gradient by its own size: a weight whose gradient is nothing but
rounding goes some way in a direction that means nothing, and the reference differs so from itself in another order of summation. A
mistake moves weights by a good part of the way."""
BAND, LEAST = 2.0, 0.1
"""Bounds of bf16: so many times the distance that the farther of two references in bf16 has from the one in fp32; and so much of
the nearer one's in the losses must be there, or it was not bf16 that ran."""


@dataclass(frozen=True)
class Figures:
    """Largest differences over all steps, or after the last one, from the reference in fp32."""

    loss: float
    """max |Δ loss|."""
    loss_relative: float
    norm: float
    """max |Δ gradient norm|, before clipping."""
    norm_relative: float
    weight: float
    """max |Δ weight| after the last step."""
    weight_relative: float
    """Of all weights together: length of the difference / length of the way that training took them."""


@dataclass(frozen=True)
class Bounds:
    """What figures may be: column -> largest; and the smallest relative difference of losses."""

    most: dict[str, float]
    least: float = 0.0

    def broken(self, figures: Figures) -> list[str]:
        """Columns that are out of bounds; NaN is."""
        out = [column for column, limit in self.most.items() if not getattr(figures, column) <= limit]
        return out + (
            [] if figures.loss_relative >= self.least or "loss_relative" in out else ["loss_relative"]
        )


def exact(way: float) -> Bounds:
    """Of fp32. `way`: the sum of the learning rates."""
    return Bounds({"loss_relative": LOSS, "norm_relative": NORM, "weight": WEIGHT * way})


def band(first: Figures, second: Figures) -> Bounds:
    """Of bf16, by the figures of two references."""
    columns = ("loss_relative", "norm_relative", "weight_relative")
    most = {column: BAND * max(getattr(first, column), getattr(second, column)) for column in columns}
    return Bounds(most, LEAST * min(first.loss_relative, second.loss_relative))


def compare(found: Trained, expected: Trained, start: Named) -> Figures:
    """NaN where something is missing or not a number."""
    loss, norm = (differences(found.curve, expected.curve, column) for column in (0, 1))
    return Figures(*loss, *norm, *weights_apart(found.weights, expected.weights, start))


def differences(curve: Curve, expected: Curve, column: int) -> tuple[float, float]:
    """(largest absolute, largest relative) difference of a column; NaN when a step is missing or was skipped."""
    if len(curve) != len(expected) or any(row[column] is None for row in curve):
        return math.nan, math.nan
    pairs = [(row[column], wanted[column]) for row, wanted in zip(curve, expected, strict=True)]
    return largest(abs(a - b) for a, b in pairs), largest(abs(a - b) / b for a, b in pairs)


def weights_apart(found: Named, expected: Named, start: Named) -> tuple[float, float]:
    """(largest difference of an element, ‖difference‖ / ‖way‖ of all together); NaN when names or shapes are not the same."""
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in expected.items()}:
        return math.nan, math.nan
    apart = {name: found[name].double() - expected[name].double() for name in expected}
    length = math.hypot(*(float(tensor.norm()) for tensor in apart.values()))
    way = math.hypot(*(float((expected[name].double() - start[name].double()).norm()) for name in expected))
    return largest(float(tensor.abs().max()) for tensor in apart.values()), length / way


def largest(values: Iterable[float]) -> float:
    """NaN when one of them is."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)
