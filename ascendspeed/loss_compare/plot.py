"""The picture of a comparison, as the published page has it: both curves, and the relative error below."""

import io
from collections.abc import Sequence

from ascendspeed.loss_compare.align import WORDS, Pair
from ascendspeed.loss_compare.metrics import LIMIT, errors

REF, CAND, BAND = "#1f77b4", "#d62728", "#9ecae1"


def draw(pair: Pair, title: str, noise: Pair | None = None) -> bytes:
    """A PNG. `noise`: the reference and a second run of it, whose distance is drawn as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), dpi=110, layout="constrained")
    losses, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    ref, cand = [step.loss for step in pair.ref], [step.loss for step in pair.cand]
    alone = {"marker": "."} if len(ref) == 1 else {}
    if noise:
        second = [step.loss for step in noise.cand]
        low, high = ([pick(both) for both in zip(ref, second, strict=True)] for pick in (min, max))
        losses.fill_between(
            pair.places, low, high, color=BAND, alpha=0.8, label="reference and its second run"
        )
        below.fill_between(
            pair.places,
            0,
            _percent(errors(noise)),
            color=BAND,
            alpha=0.8,
            label="second run of the reference",
        )
    losses.plot(pair.places, ref, color=REF, lw=1.4, label="reference", **alone)
    losses.plot(pair.places, cand, color=CAND, lw=1.0, ls="--", label="candidate", **alone)
    losses.set(ylabel="loss per token", title=title)
    below.plot(pair.places, _percent(errors(pair)), color=CAND, lw=0.9, label="candidate", **alone)
    if (
        below.get_ylim()[1] > LIMIT * 10
    ):  # per cent: a tenth of the limit; under it, the line would hide the errors
        below.axhline(LIMIT * 100, color="gray", lw=0.8, ls=":", label=f"{LIMIT:.0%}")
    below.set(xlabel=WORDS[pair.axis], ylabel="relative error (%)", ylim=(0, None))
    for axes in (losses, below):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", fontsize=8)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()


def _percent(values: Sequence[float]) -> list[float]:
    return [value * 100 for value in values]
