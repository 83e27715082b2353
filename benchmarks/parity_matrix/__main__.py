"""Compares every layout of both engines with one process of plain torch: losses, gradient norms, weights.

    python -m benchmarks.parity_matrix --out benchmarks/results/parity-matrix.md
    python -m benchmarks.parity_matrix --families internlm2 --rows TP2 CP2

The reference is Hugging Face's model. Rows are layouts of the DeepSpeed and the Megatron engine, in fp32 and
bf16; controls contain one mistake and must not pass. The table is written as Markdown, and as JSON beside it.
Exit code 1: a row is out of bounds, or a control within them.
"""

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    """Flags of the parity matrix."""

    families: tuple[Literal["internlm", "internlm2", "mixtral"], ...] = ("internlm", "internlm2", "mixtral")
    """Model families."""
    rows: tuple[str, ...] = ()
    """Run only rows and controls whose titles contain one of these; none: all."""
    steps: int = 20
    """Training steps of every row."""
    onednn: bool = False
    """Compute the products of the linears in fp32 by oneDNN, whatever their sizes and the CPU."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file for the table; a .json of the same name is written beside it. None: print only."""


def _print(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Measures, prints and writes the table. Returns 1 if a row or a control fails."""
    options = parser.parse(Options, description=__doc__ or "")
    if options.steps < 2:
        raise UserError(f"--steps {options.steps}: at least 2, as the first one has the learning rate 0")
    if options.out and (options.out.is_dir() or options.out.suffix == ".json"):
        raise UserError(f"--out {options.out}: the name of a Markdown file; a .json is written beside it")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests' reference and worker

    from ascendspeed.distributed import device

    cpu = device.prepare("cpu")
    importlib.import_module("torch").set_num_threads(1)  # as on every rank

    from ascendspeed.utils.atomic import write_file
    from benchmarks.parity_matrix import report, runner

    facts = report.environment_facts(cpu.name + ", products by oneDNN" * options.onednn)
    with tempfile.TemporaryDirectory() as work:
        measured = runner.run_matrix(
            options.families, options.rows, options.steps, Path(work), _print, options.onednn
        )
    text = report.as_markdown(measured, facts)
    print(text)
    if options.out:
        write_file(options.out, text)
        write_file(options.out.with_suffix(".json"), report.as_json(measured, facts))
    return 0 if measured.good else 1


if __name__ == "__main__":
    errors.run(main, clean_up=True)
