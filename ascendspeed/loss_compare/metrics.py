"""Metrics of a comparison, each defined by the docstring of its field, and the verdict by profile."""

import ast
import inspect
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ascendspeed.loss_compare.align import AlignedCurves
from ascendspeed.loss_compare.curve import EXACT_DIGITS, LossCurve
from ascendspeed.utils.errors import UserError

LIMIT = 0.02
"""Published bound of the relative error."""
EPSILON = 1e-6
"""Smallest denominator of a relative error: avoids a division by a loss of 0."""

Profile = Literal["published", "strict", "bitwise"]


@dataclass(frozen=True)
class LossMetrics:
    """Distance of a candidate from its reference.

    Per step, e = |candidate - reference| / max(|reference|, 1e-6).
    """

    steps: int
    """Steps compared."""
    mean: float
    """Mean of e over the steps."""
    p50: float
    """Median of e."""
    p99: float
    """99th percentile of e, interpolated linearly."""
    maximum: float
    """Largest e."""
    worst_at: int
    """Position of the largest e."""
    of_averages: float
    """Relative error of the average loss: |mean(cand) - mean(ref)| / max(|mean(ref)|, 1e-6)."""
    bias: float
    """Mean of the signed e: above 0 when the candidate's loss is the higher one."""
    max_absolute: float
    """Largest |candidate - reference|."""
    share_below: float
    """Share of the steps with e < 2 %."""
    first_step: float
    """e of the first step: weights and data alone, before any update differs."""
    grad_norm_mean: float | None
    """Mean relative error of the gradient norm, over the steps where both logs have a finite one."""
    grad_norm_max: float | None
    """Largest relative error of the gradient norm."""
    identical: int
    """Steps with identical losses, as the logs show them."""
    grad_norm_identical: int | None
    """Steps with identical gradient norms, finite or not; not available if neither log has any."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison under a profile."""

    profile: Profile
    passed: bool
    reason: str


def format_percent(value: float) -> str:
    """Formats 0.0123 as 1.23%, and values too small for two decimals as 1.23e-04%."""
    return f"{value:.2%}" if value == 0 or abs(value) >= 1e-4 else f"{value * 100:.2e}%"


def relative_error(value: float, reference: float) -> float:
    """Returns |value - reference| / max(|reference|, EPSILON)."""
    return abs(value - reference) / max(abs(reference), EPSILON)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value below which `share` (0 to 1) of `values` are, interpolated linearly between
    neighbours.
    """
    ordered = sorted(values)
    position = share * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def relative_errors(aligned: AlignedCurves) -> list[float]:
    """Returns e of every step."""
    return [relative_error(cand.loss, ref.loss) for ref, cand in zip(aligned.ref, aligned.cand, strict=True)]


def compute_metrics(aligned: AlignedCurves) -> LossMetrics:
    """Computes all metrics of two aligned curves."""
    ref = [step.loss for step in aligned.ref]
    cand = [step.loss for step in aligned.cand]
    e = relative_errors(aligned)
    n = len(aligned.positions)
    norms = [(a.grad_norm, b.grad_norm) for a, b in zip(aligned.ref, aligned.cand, strict=True)]
    norm_errors = [
        relative_error(b, a) for a, b in norms if None not in (a, b) and math.isfinite(a) and math.isfinite(b)
    ]
    has_norms = any(norm is not None for pair in norms for norm in pair)
    return LossMetrics(
        steps=n,
        mean=math.fsum(e) / n,
        p50=percentile(e, 0.5),
        p99=percentile(e, 0.99),
        maximum=max(e),
        worst_at=aligned.positions[e.index(max(e))],
        of_averages=relative_error(math.fsum(cand) / n, math.fsum(ref) / n),
        bias=math.fsum((b - a) / max(abs(a), EPSILON) for a, b in zip(ref, cand, strict=True)) / n,
        max_absolute=max(abs(b - a) for a, b in zip(ref, cand, strict=True)),
        share_below=sum(x < LIMIT for x in e) / n,
        first_step=e[0],
        grad_norm_mean=math.fsum(norm_errors) / len(norm_errors) if norm_errors else None,
        grad_norm_max=max(norm_errors) if norm_errors else None,
        identical=sum(a == b for a, b in zip(ref, cand, strict=True)),
        grad_norm_identical=sum(a == b for a, b in norms) if has_norms else None,
    )


def judge(metrics: LossMetrics, profile: Profile) -> Verdict:
    """Judges by profile: `published`: the mean of e is below 2 %; `strict`: every e is; `bitwise`: all losses
    and norms are equal.
    """
    n, limit = metrics.steps, f"{LIMIT:.0%}"
    if profile == "published":
        reason = f"mean relative error {format_percent(metrics.mean)}, the limit is {limit}"
        return Verdict(profile, metrics.mean < LIMIT, reason)
    if profile == "strict":
        worst = f"the worst is {format_percent(metrics.maximum)}, at {metrics.worst_at}"
        reason = f"{metrics.share_below:.2%} of {n} steps below {limit}; {worst}"
        return Verdict(profile, metrics.maximum < LIMIT, reason)
    identical_norms = metrics.grad_norm_identical
    if identical_norms is None:
        norms = "the logs have no gradient norms"
    else:
        norms = f"{identical_norms} of {n} gradient norms are"
    return Verdict(
        profile,
        metrics.identical == n and identical_norms in (None, n),
        f"{metrics.identical} of {n} losses are the same number; {norms}",
    )


def require_exact_digits(*curves: LossCurve) -> None:
    """Raises UserError if a log rounds its losses or gradient norms: equal text would prove nothing about
    bits.
    """
    for curve in curves:
        for field, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            digits = curve.digits.get(field, EXACT_DIGITS)
            if digits < EXACT_DIGITS:
                raise UserError(
                    f"{curve.path}: --profile bitwise needs {EXACT_DIGITS} digits of every {name}, this log "
                    f"shows {digits}; compare TensorBoard events, or use --profile strict"
                )


def metric_definitions() -> dict[str, str]:
    """Returns metric -> its definition: the docstring under the field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(LossMetrics))).body[0].body
    return {
        field.target.id: docstring.value.value
        for field, docstring in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr)
    }
