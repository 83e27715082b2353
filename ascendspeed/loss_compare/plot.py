"""Plot of a comparison, as on the published page: both loss curves, and the relative error below."""

import io
from collections.abc import Sequence

from ascendspeed.loss_compare.align import AXIS_NAMES, AlignedCurves
from ascendspeed.loss_compare.metrics import LIMIT, relative_errors

REF, CAND, BAND = "#1f77b4", "#d62728", "#9ecae1"


def draw_comparison(aligned: AlignedCurves, title: str, noise: AlignedCurves | None = None) -> bytes:
    """Returns a PNG.

    `noise`: the reference and its second run; the distance between them is drawn as a band.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), dpi=110, layout="constrained")
    loss_axes, error_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    x = aligned.positions
    ref = [step.loss for step in aligned.ref]
    cand = [step.loss for step in aligned.cand]
    marker = {"marker": "."} if len(ref) == 1 else {}
    if noise:
        second = [step.loss for step in noise.cand]
        low = [min(pair) for pair in zip(ref, second, strict=True)]
        high = [max(pair) for pair in zip(ref, second, strict=True)]
        loss_axes.fill_between(x, low, high, color=BAND, alpha=0.8, label="reference and its second run")
        noise_errors = _percent(relative_errors(noise))
        error_axes.fill_between(
            x, 0, noise_errors, color=BAND, alpha=0.8, label="second run of the reference"
        )
    loss_axes.plot(x, ref, color=REF, lw=1.4, label="reference", **marker)
    loss_axes.plot(x, cand, color=CAND, lw=1.0, ls="--", label="candidate", **marker)
    loss_axes.set(ylabel="loss per token", title=title)
    error_axes.plot(x, _percent(relative_errors(aligned)), color=CAND, lw=0.9, label="candidate", **marker)
    # The axis is in percent: the line of the limit is drawn if the errors reach a tenth of it; else it would
    # flatten them.
    if error_axes.get_ylim()[1] > LIMIT * 10:
        error_axes.axhline(LIMIT * 100, color="gray", lw=0.8, ls=":", label=f"{LIMIT:.0%}")
    error_axes.set(xlabel=AXIS_NAMES[aligned.axis], ylabel="relative error (%)", ylim=(0, None))
    for axes in (loss_axes, error_axes):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", fontsize=8)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return png.getvalue()


def _percent(values: Sequence[float]) -> list[float]:
    return [value * 100 for value in values]
