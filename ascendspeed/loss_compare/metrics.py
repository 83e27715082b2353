"""The figures of a comparison, each defined where it stands, and the verdict by profile."""

import ast
import inspect
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ascendspeed.loss_compare.align import Pair
from ascendspeed.loss_compare.curve import EXACT, Curve
from ascendspeed.utils.errors import UserError

LIMIT = 0.02
"""The published bound of a relative error."""
EPSILON = 1e-6
"""Least denominator of a relative error: a loss of 0 is no reason to divide by it."""

Profile = Literal["published", "strict", "bitwise"]


@dataclass(frozen=True)
class Figures:
    """How far a candidate is from its reference. Per step, e = |candidate - reference| / max(|reference|, 1e-6)."""

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
    """Where the largest e is."""
    of_averages: float
    """Relative error of the average loss: |mean(candidate) - mean(reference)| / max(|mean(reference)|, 1e-6)."""
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
    """Steps whose losses are the same number, as the logs show them."""
    grad_norm_identical: int | None
    """Steps whose gradient norms are, finite or not; none when neither log has any."""


@dataclass(frozen=True)
class Verdict:
    """Whether a comparison passed, and why."""

    profile: Profile
    passed: bool
    says: str


def percent(value: float) -> str:
    """0.0123 -> 1.23%; what is too small for that as 1.23e-04%."""
    return f"{value:.2%}" if value == 0 or abs(value) >= 1e-4 else f"{value * 100:.2e}%"


def relative(value: float, reference: float) -> float:
    """|value - reference| / max(|reference|, EPSILON)."""
    return abs(value - reference) / max(abs(reference), EPSILON)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie, interpolated linearly between two of them."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def errors(pair: Pair) -> list[float]:
    """e of every step."""
    return [relative(b.loss, a.loss) for a, b in zip(pair.ref, pair.cand, strict=True)]


def measure(pair: Pair) -> Figures:
    """All figures of two aligned curves."""
    ref, cand = [step.loss for step in pair.ref], [step.loss for step in pair.cand]
    e, n = errors(pair), len(pair.places)
    norms = [(a.grad_norm, b.grad_norm) for a, b in zip(pair.ref, pair.cand, strict=True)]
    off = [relative(b, a) for a, b in norms if None not in (a, b) and math.isfinite(a) and math.isfinite(b)]
    return Figures(
        steps=n,
        mean=math.fsum(e) / n,
        p50=percentile(e, 0.5),
        p99=percentile(e, 0.99),
        maximum=max(e),
        worst_at=pair.places[e.index(max(e))],
        of_averages=relative(math.fsum(cand) / n, math.fsum(ref) / n),
        bias=math.fsum((b - a) / max(abs(a), EPSILON) for a, b in zip(ref, cand, strict=True)) / n,
        max_absolute=max(abs(b - a) for a, b in zip(ref, cand, strict=True)),
        share_below=sum(x < LIMIT for x in e) / n,
        first_step=e[0],
        grad_norm_mean=math.fsum(off) / len(off) if off else None,
        grad_norm_max=max(off) if off else None,
        identical=sum(a == b for a, b in zip(ref, cand, strict=True)),
        grad_norm_identical=sum(a == b for a, b in norms)
        if any(norm is not None for both in norms for norm in both)
        else None,
    )


def judge(figures: Figures, profile: Profile) -> Verdict:
    """published: the mean of e is below 2 %; strict: every e is; bitwise: every loss and gradient norm is the same number."""
    n, limit = figures.steps, f"{LIMIT:.0%}"
    if profile == "published":
        return Verdict(
            profile,
            figures.mean < LIMIT,
            f"mean relative error {percent(figures.mean)}, the limit is {limit}",
        )
    if profile == "strict":
        says = f"{figures.share_below:.2%} of {n} steps below {limit}; the worst is {percent(figures.maximum)}, at {figures.worst_at}"
        return Verdict(profile, figures.maximum < LIMIT, says)
    norms = figures.grad_norm_identical
    said = "the logs have no gradient norms" if norms is None else f"{norms} of {n} gradient norms are"
    return Verdict(
        profile,
        figures.identical == n and norms in (None, n),
        f"{figures.identical} of {n} losses are the same number; {said}",
    )


def check_digits(*curves: Curve) -> None:
    """Raises `UserError` when a log rounds its losses or gradient norms: equal text would prove nothing about bits."""
    for curve in curves:
        for field, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            digits = curve.digits.get(field, EXACT)
            if digits < EXACT:
                raise UserError(
                    f"{curve.path}: --profile bitwise needs {EXACT} digits of every {name}, this log shows {digits}; "
                    "compare TensorBoard events, or use --profile strict"
                )


def definitions() -> dict[str, str]:
    """Figure -> its definition: the docstring under the field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(Figures))).body[0].body
    pairs = itertools.pairwise(body)
    return {
        a.target.id: b.value.value
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    }
