"""Report of a comparison: parity.json, parity.png and a self-contained parity.html."""

import base64
import datetime
import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ascendspeed.loss_compare import plot
from ascendspeed.loss_compare.align import AXIS_NAMES
from ascendspeed.loss_compare.compare import Comparison
from ascendspeed.loss_compare.curve import LossCurve
from ascendspeed.loss_compare.metrics import LossMetrics, format_percent, metric_definitions
from ascendspeed.loss_compare.page_template import STYLE, environment
from ascendspeed.loss_compare.performance_table import performance_row
from ascendspeed.utils.atomic import remove_file, write_file

TEMPLATE = Path(__file__).with_name("page.html")
ABSOLUTE_METRICS = {"steps", "worst_at", "max_absolute", "identical", "grad_norm_identical"}
FILE_NAMES = ("parity.png", "parity.html", "parity.json")


def write_report(comparison: Comparison, out: str | Path) -> list[Path]:
    """Writes the three files into the folder `out`, the verdict last, so that it never stands beside an older
    plot.
    """
    remove_report(out)
    paths = [Path(out) / name for name in FILE_NAMES]
    image = plot.draw_comparison(comparison.aligned, title(comparison), comparison.noise)
    contents = (image, as_html(comparison, image), json.dumps(as_json(comparison), indent=2) + "\n")
    for path, content in zip(paths, contents, strict=True):
        write_file(path, content)
    return paths


def remove_report(out: str | Path) -> None:
    """Removes the files of an older comparison, so that one that fails leaves no verdict."""
    for name in reversed(FILE_NAMES):
        remove_file(Path(out) / name)


def title(comparison: Comparison) -> str:
    """Returns profile and verdict in one line."""
    verdict = comparison.verdict
    return f"{'PASS' if verdict.passed else 'FAIL'} ({verdict.profile}): {verdict.reason}"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the content of parity.json: plain values, without NaN."""
    second_run = {}
    if comparison.ref2:
        second_run = {
            "reference 2": _describe_log(comparison.ref2),
            "noise": asdict(comparison.noise_metrics),
        }
    return {
        "verdict": "pass" if comparison.verdict.passed else "fail",
        "profile": comparison.verdict.profile,
        "says": comparison.verdict.reason,
        "aligned by": AXIS_NAMES[comparison.aligned.axis],
        "first": comparison.aligned.positions[0],
        "last": comparison.aligned.positions[-1],
        "figures": asdict(comparison.metrics),
        "made": dict(provenance()),
        "reference": _describe_log(comparison.ref),
        "candidate": _describe_log(comparison.cand),
        **second_run,
        "origin": comparison.origin,
        "settings that differ": {name: [ref, cand] for name, ref, cand in comparison.differences},
    }


def as_text(comparison: Comparison) -> list[str]:
    """Returns the lines of the report for a terminal."""
    curves = (("reference", comparison.ref), ("candidate", comparison.cand), ("ref2", comparison.ref2))
    lines = []
    for name, curve in curves:
        if curve:
            lines.append(f"{name:9}  {_summarize(curve)}")
            lines += [f"{'':9}  {speed}"] if (speed := _speed(curve)) else []
    aligned = comparison.aligned
    lines.append(f"aligned by {AXIS_NAMES[aligned.axis]}, {aligned.positions[0]} to {aligned.positions[-1]}")
    same_origin = "same seed, weights and data"
    lines.append(
        f"origin     {same_origin if comparison.origin else 'not known: no origin.json beside the logs'}"
    )
    if comparison.is_same_log:
        lines.append("note: reference and candidate are the same file")
    noise = asdict(comparison.noise_metrics) if comparison.noise_metrics else {}
    definitions = metric_definitions()
    lines.append(_meaning()[-1])
    for name, value in asdict(comparison.metrics).items():
        line = f"  {name.replace('_', ' '):19} {format_metric(name, value):>12}"
        line += f"   noise {format_metric(name, noise[name]):>12}" if noise else ""
        lines.append(f"{line}  {_short(definitions[name])}")
    if comparison.differences:
        lines.append("settings that differ, reference | candidate:")
        lines += [f"  {name}: {ref} | {cand}" for name, ref, cand in comparison.differences]
    return [*lines, title(comparison)]


def format_metric(name: str, value: float | int | None) -> str:
    """Formats a metric; relative ones in percent."""
    if value is None or value == 0:
        return "-" if value is None else "0"
    if name not in ABSOLUTE_METRICS:
        return format_percent(value)
    return str(value) if isinstance(value, int) else f"{value:.4e}"


def as_html(comparison: Comparison, image: bytes) -> str:
    """Renders the page with the plot embedded, without scripts or external links."""
    noise = asdict(comparison.noise_metrics) if comparison.noise_metrics else {}
    definitions = metric_definitions()
    metrics = [
        (
            name.replace("_", " "),
            format_metric(name, value),
            format_metric(name, noise[name]) if noise else None,
            definitions[name],
        )
        for name, value in asdict(comparison.metrics).items()
    ]
    template = environment(TEMPLATE.parent).get_template(TEMPLATE.name)
    return template.render(
        style=STYLE.read_text("utf-8"),
        passed=comparison.verdict.passed,
        title=title(comparison),
        image=base64.b64encode(image).decode(),
        logs=[(name, _summarize(curve), _speed(curve)) for name, curve in _named_curves(comparison)],
        made=provenance(),
        axis=AXIS_NAMES[comparison.aligned.axis],
        positions=comparison.aligned.positions,
        meaning=_meaning(),
        metrics=metrics,
        noise=bool(noise),
        origin=comparison.origin,
        differing=comparison.differences,
        equal=[setting for setting in comparison.settings if setting[1] == setting[2]],
    )


def provenance() -> tuple[tuple[str, str], ...]:
    """Returns when, where, with which versions and by which command the comparison was made."""
    now = datetime.datetime.now(datetime.UTC)
    version = importlib.metadata.version("matplotlib")
    return (
        ("compared on", f"{now:%Y-%m-%d %H:%M} UTC, on {platform.node() or 'an unnamed host'}"),
        ("versions", f"Python {platform.python_version()}, matplotlib {version}; {platform.platform()}"),
        ("command", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    )


def _meaning() -> list[str]:
    """Paragraphs on the distance of a step, from the class of the metrics."""
    return [" ".join(paragraph.split()) for paragraph in (LossMetrics.__doc__ or "").split("\n\n")]


def _short(definition: str) -> str:
    """Cuts a definition at its first punctuation: `Median of e.` -> `Median of e`."""
    return re.split(r"[:;,.](?: |$)", definition, maxsplit=1)[0]


def _speed(curve: LossCurve) -> str:
    """Median speed of a run, as far as its log has it: `0.500 s per step, 64 tokens/s and device`."""
    row = performance_row(curve)
    values = (
        (row.seconds, "{:.3f} s per step"),
        (row.tokens, "{:.0f} tokens/s per device"),
        (row.tflops, "{:.3g} TFLOP/s per device"),
    )
    return ", ".join(text.format(value) for value, text in values if value)


def _named_curves(comparison: Comparison) -> list[tuple[str, LossCurve]]:
    second_run = [("second run of the reference", comparison.ref2)] if comparison.ref2 else []
    return [("reference", comparison.ref), ("candidate", comparison.cand), *second_run]


def _summarize(curve: LossCurve) -> str:
    replaced = f", {curve.replaced} repeated lines replaced by the last of each" if curve.replaced else ""
    kind = f"{curve.kind}; {curve.device}" if curve.device else curve.kind
    return f"{curve.path} ({kind}): {len(curve.steps)} steps{replaced}"


def _describe_log(curve: LossCurve) -> dict[str, Any]:
    path = Path(curve.path)
    facts = {
        "path": curve.path,
        "kind": curve.kind,
        "device": curve.device,
        "steps": len(curve.steps),
        "replaced": curve.replaced,
    }
    if path.is_file():
        with open(path, "rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts
