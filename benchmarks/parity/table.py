"""What came out, for people (Markdown) and machines (JSON)."""

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.parity import figures
from benchmarks.parity.figures import Bounds, Figures
from benchmarks.parity.running import Measured, Result

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "loss": r"max \|Δ loss\|",
    "loss_relative": "relative",
    "norm": r"max \|Δ gradient norm\|",
    "norm_relative": "relative",
    "weight": r"max \|Δ weight\|",
    "weight_relative": "Δ / way of all weights",
}
RUNNING = (
    "ascendspeed",
    "benchmarks/parity",
    *(f"tests/{name}.py" for name in ("engine_worker", "launch", "oracle")),
)


def about(device: str) -> dict[str, Any]:
    """When, where, and of what."""
    names = ("torch", "megatron-core", "deepspeed", "transformers")
    return {
        "date": str(datetime.date.today()),
        "hardware": f"{os.cpu_count()} cores of {device}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": commit(),
    }


def commit() -> str:
    """Of the code that ran, and whether it is that very code."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)

    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (
        " with local changes" if git("diff", "--quiet", "HEAD", "--", *RUNNING).returncode else ""
    )


def as_json(measured: Measured, facts: dict[str, Any]) -> str:
    """Everything; what is not a number is null."""
    record = {
        **facts,
        "steps": measured.steps,
        "seconds": round(measured.seconds),
        "good": measured.good,
        "bounds": [{"family": f, "precision": p, **asdict(b)} for (f, p), b in measured.bounds.items()],
        "references": [
            {"family": f, "reference": n, **numbers(found)} for (f, n), found in measured.references.items()
        ],
        "rows": [as_record(result) for result in measured.results],
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def as_record(result: Result) -> dict[str, Any]:
    """One row."""
    row = result.row
    return {
        "family": result.family,
        **{
            name: getattr(row, name)
            for name in ("engine", "name", "world", "precision", "control", "changes")
        },
        "figures": numbers(result.figures),
        "broken": result.broken,
        "good": result.good,
    }


def numbers(found: Figures | None) -> dict[str, float | None] | None:
    """For JSON, which has no words for what is not finite."""
    return found and {name: value if math.isfinite(value) else None for name, value in vars(found).items()}


def as_markdown(measured: Measured, facts: dict[str, Any]) -> str:
    """The page: what it is, then each family."""
    results = measured.results
    layouts, controls = ([r for r in results if bool(r.row.control) == wrong] for wrong in (False, True))
    within, seen = (sum(r.good for r in some) for some in (layouts, controls))
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# Every layout against plain torch",
        "",
        f"`python -m benchmarks.parity_matrix`, {facts['date']}, {facts['hardware']}, Python {facts['python']}, {versions}; commit "
        f"{facts['commit']}. {measured.seconds / 60:.0f} minutes.",
        "",
        f"**{within} of {len(layouts)} rows within bounds, {seen} of {len(controls)} controls out of them.**",
        "",
        *EXPLAINED.format(steps=measured.steps, figures=figures).splitlines(),
    ]
    for family in dict.fromkeys(result.family for result in results):
        lines += section(family, [result for result in results if result.family == family], measured)
    return "\n".join(lines) + "\n"


EXPLAINED = """The same weights and the same {steps} global batches (masks that differ from sample to sample, accumulation,
warmup, decay, clipping) as one process of plain torch over Hugging Face's model with torch's AdamW, whose forward pass and
optimizer have nothing of ours. Figures are the largest over all steps; weights are compared after the last one, gathered
through the training checkpoint and named as the family publishes them. `Δ / way`: length of the difference of all weights /
length of the way that training took them. The learning rates come from `ascendspeed/config/lr_schedule.py`, which is tested against
Megatron-core's.

- fp32: losses and gradient norms within {figures.LOSS:g} relative; every weight within {figures.WEIGHT:g} of the sum of the
  learning rates, the longest way that it could have gone. Adam divides a gradient by its own size, so that a weight whose
  gradient is nothing but rounding goes some way in a direction that means nothing: so far is the reference from itself when
  summed sample by sample.
- bf16: at most {figures.BAND:g} times as far from the reference in fp32 as the farther of two runs of plain torch in bf16
  over fp32 masters (sample by sample with SDPA; at once with eager attention); in the losses at least {figures.LEAST:g}
  times as far as the nearer one.
- A control has one mistake and must be out of bounds. Figures that are out of bounds are bold."""


def section(family: str, results: list[Result], measured: Measured) -> list[str]:
    """Tables of a family."""
    lines = ["", f"## {family}"]
    for precision in ("fp32", "bf16"):
        mine = [r for r in results if r.row.precision == precision and not r.row.control]
        if mine:
            lines += ["", f"{precision}:", "", *head("row"), limits(measured.bounds[family, precision])]
            lines += [line(r.row.engine + " " + r.row.name, str(r.row.world), r) for r in mine]
            others = {name: found for (of, name), found in measured.references.items() if of == family}
            lines += [
                cells(f"*plain torch, {n}*", "1", shown(f, []), "")
                for n, f in others.items()
                if n.startswith(precision)
            ]
    controls = [r for r in results if r.row.control]
    if controls:
        lines += ["", "Controls:", "", *head("row, and what is wrong")]
        lines += [line(r.row.title.replace("; control:", ":"), str(r.row.world), r) for r in controls]
    return lines


def head(first: str) -> list[str]:
    """Of a table."""
    return [cells(first, "processes", COLUMNS.values(), ""), "|---|---:|" + "---:|" * len(COLUMNS) + "---|"]


def limits(bounds: Bounds) -> str:
    """The bounds as a line of the table."""
    texts = [f"≤ {bounds.most[name]:.1e}" if name in bounds.most else "" for name in COLUMNS]
    if bounds.least:
        texts[1] = f"{bounds.least:.1e} to {bounds.most['loss_relative']:.1e}"
    return cells("**bounds**", "", texts, "")


def line(name: str, world: str, result: Result) -> str:
    """One row."""
    if result.figures is None:
        return cells(name, world, [""] * len(COLUMNS), "**did not end**")
    good, bad = ("seen", "**not seen**") if result.row.control else ("ok", "**out of bounds**")
    return cells(name, world, shown(result.figures, result.broken), good if result.good else bad)


def shown(found: Figures, broken: Iterable[str]) -> list[str]:
    """Figures in the order of the columns."""
    assert [field.name for field in fields(Figures)] == list(COLUMNS)
    return [f"**{value:.1e}**" if name in broken else f"{value:.1e}" for name, value in vars(found).items()]


def cells(first: str, second: str, others: Iterable[str], last: str) -> str:
    """A line of a table."""
    return f"| {first} | {second} | {' | '.join(others)} | {last} |"
