"""Report of the parity matrix as Markdown and JSON."""

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

from benchmarks.parity_matrix import differences
from benchmarks.parity_matrix.differences import Bounds, Differences
from benchmarks.parity_matrix.runner import MatrixResults, RowResult

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "loss": r"max \|Δ loss\|",
    "loss_relative": "relative",
    "norm": r"max \|Δ gradient norm\|",
    "norm_relative": "relative",
    "weight": r"max \|Δ weight\|",
    "weight_relative": "Δ / way of all weights",
}
SOURCES = (
    "ascendspeed",
    "benchmarks/parity_matrix",
    *(f"tests/helpers/{name}.py" for name in ("engine_worker", "launch", "oracle")),
)


def environment_facts(device: str) -> dict[str, Any]:
    """Returns date, hardware, versions and commit."""
    names = ("torch", "megatron-core", "deepspeed", "transformers")
    return {
        "date": str(datetime.date.today()),
        "hardware": f"{os.cpu_count()} cores of {device}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": commit(),
    }


def commit() -> str:
    """Returns the commit of the code, and whether it has local changes."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)

    header = git("rev-parse", "--short=12", "HEAD")
    if header.returncode:
        return "unknown"
    return header.stdout.strip() + (
        " with local changes" if git("diff", "--quiet", "HEAD", "--", *SOURCES).returncode else ""
    )


def as_json(measured: MatrixResults, facts: dict[str, Any]) -> str:
    """Returns the results as JSON; non-finite numbers are null."""
    record = {
        **facts,
        "steps": measured.steps,
        "seconds": round(measured.seconds),
        "good": measured.good,
        "bounds": [{"family": f, "precision": p, **asdict(b)} for (f, p), b in measured.bounds.items()],
        "references": [
            {"family": f, "reference": n, **finite_values(found)}
            for (f, n), found in measured.references.items()
        ],
        "rows": [as_record(result) for result in measured.results],
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def as_record(result: RowResult) -> dict[str, Any]:
    """Returns the entry of one row."""
    row = result.row
    return {
        "family": result.family,
        **{
            name: getattr(row, name)
            for name in ("engine", "name", "world", "precision", "control", "changes")
        },
        "figures": finite_values(result.differences),
        "broken": result.broken,
        "good": result.good,
    }


def finite_values(values: Differences | None) -> dict[str, float | None] | None:
    """Replaces non-finite numbers by None, for JSON."""
    return values and {name: value if math.isfinite(value) else None for name, value in vars(values).items()}


def as_markdown(measured: MatrixResults, facts: dict[str, Any]) -> str:
    """Returns the page: explanation, then the tables of each family."""
    results = measured.results
    layouts = [result for result in results if not result.row.control]
    controls = [result for result in results if result.row.control]
    within = sum(result.good for result in layouts)
    seen = sum(result.good for result in controls)
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# Every layout against plain torch",
        "",
        f"`python -m benchmarks.parity_matrix`, {facts['date']}, {facts['hardware']}, Python "
        f"{facts['python']}, {versions}; commit {facts['commit']}. {measured.seconds / 60:.0f} minutes.",
        "",
        f"**{within} of {len(layouts)} rows within bounds, {seen} of {len(controls)} controls out of them.**",
        "",
        *EXPLAINED.format(steps=measured.steps, differences=differences).splitlines(),
    ]
    for family in dict.fromkeys(result.family for result in results):
        lines += section(family, [result for result in results if result.family == family], measured)
    return "\n".join(lines) + "\n"


EXPLAINED = """The same weights and the same {steps} global batches (masks that differ from sample to
sample, accumulation, warmup, decay, clipping) as one process of plain torch over Hugging Face's model with
torch's AdamW, whose forward pass and optimizer share no code with this project. Numbers are the largest
over all steps; weights are compared after the last one, gathered through the training checkpoint and named
as the family publishes them. `Δ / way`: length of the difference of all weights / length of their change in
training. The learning rates come from `ascendspeed/config/lr_schedule.py`, which is tested against
Megatron-core's.

- fp32: losses and gradient norms within {differences.LOSS_BOUND:g} relative; every weight within
  {differences.WEIGHT_BOUND:g} of the sum of the learning rates, the farthest that it can move. Adam divides
  a gradient by its own magnitude, so a weight whose gradient is only rounding noise moves in an arbitrary
  direction: the reference differs that much from itself when summed sample by sample.
- bf16: at most {differences.BF16_FACTOR:g} times as far from the reference in fp32 as the farther of two
  runs of plain torch in bf16 over fp32 masters (sample by sample with SDPA; at once with eager attention);
  in the losses at least {differences.BF16_LEAST:g} times as far as the nearer one.
- A control has one mistake and must be out of bounds. Numbers out of bounds are bold."""


def section(family: str, results: list[RowResult], measured: MatrixResults) -> list[str]:
    """Returns the tables of a family."""
    lines = ["", f"## {family}"]
    for precision in ("fp32", "bf16"):
        regular = [r for r in results if r.row.precision == precision and not r.row.control]
        if regular:
            lines += [
                "",
                f"{precision}:",
                "",
                *header("row"),
                bounds_line(measured.bounds[family, precision]),
            ]
            lines += [result_line(r.row.engine + " " + r.row.name, str(r.row.world), r) for r in regular]
            others = {name: d for (key, name), d in measured.references.items() if key == family}
            lines += [
                table_row(f"*plain torch, {n}*", "1", format_differences(f, []), "")
                for n, f in others.items()
                if n.startswith(precision)
            ]
    controls = [r for r in results if r.row.control]
    if controls:
        lines += ["", "Controls:", "", *header("row, and what is wrong")]
        lines += [result_line(r.row.title.replace("; control:", ":"), str(r.row.world), r) for r in controls]
    return lines


def header(first: str) -> list[str]:
    """Returns the header of a table."""
    return [
        table_row(first, "processes", COLUMNS.values(), ""),
        "|---|---:|" + "---:|" * len(COLUMNS) + "---|",
    ]


def bounds_line(bounds: Bounds) -> str:
    """Returns the bounds as a row of the table."""
    texts = [f"≤ {bounds.most[name]:.1e}" if name in bounds.most else "" for name in COLUMNS]
    if bounds.least:
        texts[1] = f"{bounds.least:.1e} to {bounds.most['loss_relative']:.1e}"
    return table_row("**bounds**", "", texts, "")


def result_line(name: str, world: str, result: RowResult) -> str:
    """Returns a result as a row of the table."""
    if result.differences is None:
        return table_row(name, world, [""] * len(COLUMNS), "**did not end**")
    good, bad = ("seen", "**not seen**") if result.row.control else ("ok", "**out of bounds**")
    return table_row(
        name, world, format_differences(result.differences, result.broken), good if result.good else bad
    )


def format_differences(values: Differences, broken: Iterable[str]) -> list[str]:
    """Formats differences in the order of the columns; those out of bounds are bold."""
    assert [field.name for field in fields(Differences)] == list(COLUMNS)
    return [f"**{value:.1e}**" if name in broken else f"{value:.1e}" for name, value in vars(values).items()]


def table_row(first: str, second: str, others: Iterable[str], last: str) -> str:
    """Joins cells to a row of the table."""
    return f"| {first} | {second} | {' | '.join(others)} | {last} |"
