"""Compares two logs, optionally with a second run of the reference: aligned curves, metrics and verdict."""

from dataclasses import dataclass
from pathlib import Path

from ascendspeed.loss_compare import metrics, origin, read_logs
from ascendspeed.loss_compare.align import AlignedCurves, align
from ascendspeed.loss_compare.curve import INPUTS, LossCurve, flatten_config
from ascendspeed.loss_compare.metrics import LossMetrics, Profile, Verdict
from ascendspeed.utils.errors import UserError

Setting = tuple[str, str | None, str | None]
"""(name, value of the reference, value of the candidate); None: not in the log."""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing two runs."""

    ref: LossCurve
    cand: LossCurve
    aligned: AlignedCurves
    metrics: LossMetrics
    verdict: Verdict
    settings: tuple[Setting, ...]
    """Settings of both runs, by name; empty if a log lacks them."""
    origin: dict[str, str] | None
    """Seed and hashes of weights and data, equal in all runs; None if a log has no origin.json beside it."""
    ref2: LossCurve | None = None
    noise: AlignedCurves | None = None
    """The reference and its second run."""
    noise_metrics: LossMetrics | None = None

    @property
    def differences(self) -> tuple[Setting, ...]:
        """Settings that differ, or that only one run has."""
        return tuple(setting for setting in self.settings if setting[1] != setting[2])

    @property
    def is_same_log(self) -> bool:
        """The reference and the candidate are one file, so that any comparison passes."""
        return Path(self.ref.path).resolve() == Path(self.cand.path).resolve()


def compare(
    ref: str | Path,
    cand: str | Path,
    ref2: str | Path | None = None,
    profile: Profile = "published",
    first: int | None = None,
    last: int | None = None,
    same_origin: bool = False,
) -> Comparison:
    """Reads, aligns, measures and judges. `same_origin` requires an origin.json beside every log.

    Raises UserError for logs that cannot be read or do not belong together: other steps, NaNs, other weights,
    data or seed.
    """
    ref_curve, cand_curve = read_logs.read_log(ref), read_logs.read_log(cand)
    ref2_curve = read_logs.read_log(ref2) if ref2 else None
    paths = [curve.path for curve in (ref_curve, cand_curve, ref2_curve) if curve]
    common_origin = origin.check_same_origin(*paths, required=same_origin)
    aligned = align(ref_curve, cand_curve, first, last)
    noise = align(ref_curve, ref2_curve, first, last) if ref2_curve else None
    if noise and noise.positions != aligned.positions:
        raise UserError(
            f"{ref2_curve.path} is aligned by {noise.axis}, the other two logs by {aligned.axis}: give logs "
            "of one kind"
        )
    if profile == "bitwise":
        metrics.require_exact_digits(ref_curve, cand_curve)
    measured = metrics.compute_metrics(aligned)
    return Comparison(
        ref=ref_curve,
        cand=cand_curve,
        aligned=aligned,
        metrics=measured,
        verdict=metrics.judge(measured, profile),
        settings=_settings(ref_curve, cand_curve),
        origin=common_origin,
        ref2=ref2_curve,
        noise=noise,
        noise_metrics=metrics.compute_metrics(noise) if noise else None,
    )


def _settings(ref: LossCurve, cand: LossCurve) -> tuple[Setting, ...]:
    ref_config, cand_config = flatten_config(ref.config or {}), flatten_config(cand.config or {})
    if not ref_config or not cand_config:  # with one side missing, every setting would differ
        return ()
    names = sorted(ref_config.keys() | cand_config.keys())
    if not all(INPUTS in (curve.config or {}) for curve in (ref, cand)):  # an earlier version records none
        names = [name for name in names if not name.startswith(f"{INPUTS}.")]
    return tuple((name, ref_config.get(name), cand_config.get(name)) for name in names)
