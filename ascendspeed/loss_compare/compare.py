"""One comparison: two logs (and a second run of the reference) -> steps side by side, figures, verdict."""

from dataclasses import dataclass
from pathlib import Path

from ascendspeed.loss_compare import metrics, origin, read_logs
from ascendspeed.loss_compare.align import Pair, align
from ascendspeed.loss_compare.curve import Curve, flat
from ascendspeed.loss_compare.metrics import Figures, Profile, Verdict
from ascendspeed.utils.errors import UserError

Setting = tuple[str, str | None, str | None]
"""Name, the reference's value, the candidate's; None: not said."""


@dataclass(frozen=True)
class Comparison:
    """All that is known of two runs beside each other."""

    ref: Curve
    cand: Curve
    pair: Pair
    figures: Figures
    verdict: Verdict
    settings: tuple[Setting, ...]
    """Of both runs, by name; none when neither log has them."""
    origin: dict[str, str] | None
    """Seed and hashes of weights and data, when both logs have them beside them; they are the same then."""
    ref2: Curve | None = None
    noise: Pair | None = None
    """The reference and a second run of it."""
    noise_figures: Figures | None = None

    @property
    def differences(self) -> tuple[Setting, ...]:
        """Settings that are not the same, or that one run only has."""
        return tuple(setting for setting in self.settings if setting[1] != setting[2])


def compare(
    ref: str | Path,
    cand: str | Path,
    ref2: str | Path | None = None,
    profile: Profile = "published",
    first: int | None = None,
    last: int | None = None,
    same_origin: bool = False,
) -> Comparison:
    """Reads, aligns, measures and judges. `same_origin`: insist on origin.json beside both logs.

    Raises `UserError` for logs that cannot be read or do not belong together: other steps, NaNs, other weights, data or seed.
    """
    a, b = read_logs.read(ref), read_logs.read(cand)
    c = read_logs.read(ref2) if ref2 else None
    begins = origin.check_same(*(curve.path for curve in (a, b, c) if curve), needed=same_origin)
    pair = align(a, b, first, last)
    noise = align(a, c, first, last) if c else None
    if noise and noise.places != pair.places:
        raise UserError(
            f"{c.path} is aligned by {noise.axis}, the other two logs by {pair.axis}: give logs of one kind"
        )
    if profile == "bitwise":
        metrics.check_digits(a, b)
    found = metrics.measure(pair)
    return Comparison(
        ref=a,
        cand=b,
        pair=pair,
        figures=found,
        verdict=metrics.judge(found, profile),
        settings=_settings(a, b),
        origin=begins,
        ref2=c,
        noise=noise,
        noise_figures=metrics.measure(noise) if noise else None,
    )


def _settings(a: Curve, b: Curve) -> tuple[Setting, ...]:
    one, other = flat(a.config or {}), flat(b.config or {})
    if not one or not other:  # nothing to set side by side
        return ()
    return tuple((name, one.get(name), other.get(name)) for name in sorted(one.keys() | other.keys()))
