"""Checks this project on one GPU or NPU, then measures it, in at most nine minutes.

    python benchmarks/gpu_first_run.py --out gpu-first-run
    python benchmarks/gpu_first_run.py --dry --out dry-run           on a CPU with toy sizes

Every part runs in a process of its own with a limit; one that fails is reported and the next begins.
Forecasts of a simulation (fake tensors; an H200 with 788 TFLOP/s and 4.0 TB/s) are printed beside the
measurements. The folder of --out receives report.md, a log of every part and trace.json. Exit code 1 if a
part failed.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "right": 85,
    "gemm": 40,
    "triton": 35,
    "engine": 215,
    "serving": 65,
    "attention": 35,
    "pointwise": 30,
    "trace": 35,
}
"""Part -> seconds, 540 in all, in the order in which they run."""
START_PART = [sys.executable, "-W", "ignore", "-c", "from first_run_parts import main; main()"]
"""Command that runs `first_run_parts.main`; PART, DEVICE and FOLDER follow."""
DRY_FACTOR = 4
"""Longer limits on a CPU, which other work may share."""


@dataclass(frozen=True)
class Options:
    """First run on a device: correctness, rates of products, whole steps, a trace."""

    out: Annotated[str, parser.output_flag("out")] = "first-run"
    """Folder for the report, logs and the trace."""
    device: Literal["cuda", "npu"] = "cuda"
    """Device."""
    dry: bool = False
    """Run every part on the CPU with toy sizes."""
    only: tuple[str, ...] = ()
    """Parts to run; default: all of right, gemm, triton, engine, serving, attention,
    pointwise, trace."""


@dataclass(frozen=True)
class PartResult:
    """Result of one part."""

    seconds: float
    problem: str
    """Empty if the part succeeded."""
    tables: list[dict[str, Any]]
    """Tables as {"title", "columns", "rows"}."""


def main() -> int:
    """Runs the parts and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    if unknown := [name for name in options.only if name not in LIMITS]:
        raise UserError(f"--only {unknown[0]}: no such part; choose from {', '.join(LIMITS)}")
    folder = Path(options.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in options.only or LIMITS:
        results[name] = _run(name, options, folder)
        print(_section(name, results[name]), flush=True)
        (folder / "report.md").write_text(_report(results, options))
    return 1 if any(result.problem for result in results.values()) else 0


def _run(name: str, options: Options, folder: Path) -> PartResult:
    device = "cpu" if options.dry else options.device
    threads = "1" if options.dry else str(os.cpu_count())
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": threads,
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    if options.dry:
        environment["TRITON_INTERPRET"] = "1"  # kernels of Triton compile for a GPU only
    table_file = folder / f"{name}.json"
    table_file.unlink(missing_ok=True)
    command = [*START_PART, name, device]
    limit = LIMITS[name] * (DRY_FACTOR if options.dry else 1)
    began, problem = time.monotonic(), ""
    with open(folder / f"{name}.log", "w") as log:
        try:
            code = subprocess.run(
                [*command, str(folder)], env=environment, stdout=log, stderr=log, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            problem = f"over its {limit} s"
        else:
            lines = (folder / f"{name}.log").read_text().strip().splitlines()
            problem = f"exit code {code}: {lines[-1][:200] if lines else ''}" if code else ""
    tables = json.loads(table_file.read_text()) if table_file.exists() else []
    return PartResult(time.monotonic() - began, problem, tables)


def _section(name: str, result: PartResult) -> str:
    lines = [f"## {name} ({result.seconds:.0f} s)", ""]
    if result.problem:
        lines += [f"**FAILED**: {result.problem}", ""]
    for table in result.tables:
        lines += [
            table["title"],
            "",
            f"| {' | '.join(table['columns'])} |",
            "|---" * len(table["columns"]) + "|",
        ]
        lines += [f"| {' | '.join(map(str, row))} |" for row in table["rows"]] + [""]
    return "\n".join(lines)


def _report(results: dict[str, PartResult], options: Options) -> str:
    facts = (
        f"{datetime.date.today()}, {platform.machine()}, torch {version('torch')}, megatron-core "
        f"{version('megatron-core')}, deepspeed {version('deepspeed')}"
    )
    command = f"python benchmarks/gpu_first_run.py {' '.join(sys.argv[1:])}"
    title = "Dry run on a CPU with toy sizes" if options.dry else f"First run on {options.device}"
    sections = [_section(name, result) for name, result in results.items()]
    return "\n".join([f"# {title}", "", f"{facts}. `{command.strip()}`", "", *sections])


if __name__ == "__main__":
    errors.run(main)
