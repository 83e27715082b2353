"""Differences between a run and its reference, and their bounds. Starts no processes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.parity_matrix.reference import MetricCurve, NamedTensors, TrainedModel

LOSS_BOUND, NORM_BOUND, WEIGHT_BOUND = 1e-5, 1e-5, 1e-3
"""Bounds of fp32: relative differences of losses and gradient norms, and the largest difference of a weight
as a share of the sum of the learning rates, the farthest that Adam can move it.

Adam divides a gradient by its own magnitude: a weight whose gradient is only rounding noise moves in an
arbitrary direction, and the reference differs that much from itself in another order of summation. A mistake
moves weights by a large part of that distance.
"""
BF16_FACTOR, BF16_LEAST = 2.0, 0.1
"""Bounds of bf16: factor on the larger distance of two bf16 references from the fp32 one, and the share of
the smaller distance that the losses must reach; otherwise the run was not in bf16.
"""


@dataclass(frozen=True)
class Differences:
    """Largest differences from the fp32 reference over all steps; of weights after the last step."""

    loss: float
    """max |Δ loss|."""
    loss_relative: float
    norm: float
    """max |Δ gradient norm|, before clipping."""
    norm_relative: float
    weight: float
    """max |Δ weight| after the last step."""
    weight_relative: float
    """Length of the difference of all weights / length of their total change in training."""


@dataclass(frozen=True)
class Bounds:
    """Limits of differences: column -> largest value, and the smallest relative difference of losses."""

    most: dict[str, float]
    least: float = 0.0

    def broken(self, differences: Differences) -> list[str]:
        """Returns the columns out of bounds; NaN is out of bounds."""
        out = [column for column, limit in self.most.items() if not getattr(differences, column) <= limit]
        return out + (
            [] if differences.loss_relative >= self.least or "loss_relative" in out else ["loss_relative"]
        )


def fp32_bounds(lr_sum: float) -> Bounds:
    """Returns the bounds of fp32. `lr_sum`: the sum of the learning rates."""
    return Bounds({"loss_relative": LOSS_BOUND, "norm_relative": NORM_BOUND, "weight": WEIGHT_BOUND * lr_sum})


def bf16_bounds(first: Differences, second: Differences) -> Bounds:
    """Returns the bounds of bf16 from the differences of two references."""
    columns = ("loss_relative", "norm_relative", "weight_relative")
    most = {column: BF16_FACTOR * max(getattr(first, column), getattr(second, column)) for column in columns}
    return Bounds(most, BF16_LEAST * min(first.loss_relative, second.loss_relative))


def compare(actual: TrainedModel, expected: TrainedModel, start: NamedTensors) -> Differences:
    """Returns all differences; NaN for missing or non-finite values."""
    loss, norm = (column_difference(actual.curve, expected.curve, column) for column in (0, 1))
    return Differences(*loss, *norm, *weight_difference(actual.weights, expected.weights, start))


def column_difference(curve: MetricCurve, expected: MetricCurve, column: int) -> tuple[float, float]:
    """Returns the largest absolute and relative difference of a column; NaN if a step is missing or was
    skipped.
    """
    if len(curve) != len(expected) or any(row[column] is None for row in curve):
        return math.nan, math.nan
    pairs = [(row[column], wanted[column]) for row, wanted in zip(curve, expected, strict=True)]
    return maximum(abs(a - b) for a, b in pairs), maximum(abs(a - b) / b for a, b in pairs)


def weight_difference(
    actual: NamedTensors, expected: NamedTensors, start: NamedTensors
) -> tuple[float, float]:
    """Returns the largest difference of an element and the relative length of the difference of all weights;
    NaN if names or shapes differ.
    """
    if {name: t.shape for name, t in actual.items()} != {name: t.shape for name, t in expected.items()}:
        return math.nan, math.nan
    difference = {name: actual[name].double() - expected[name].double() for name in expected}
    length = math.hypot(*(float(tensor.norm()) for tensor in difference.values()))
    way = math.hypot(*(float((expected[name].double() - start[name].double()).norm()) for name in expected))
    return maximum(float(tensor.abs().max()) for tensor in difference.values()), length / way


def maximum(values: Iterable[float]) -> float:
    """Returns the maximum; NaN if a value is NaN."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)
