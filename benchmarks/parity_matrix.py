"""Every layout of both engines against one process of plain torch over Hugging Face's model: losses, gradient norms, weights.

    python -m benchmarks.parity_matrix --out benchmarks/results/parity-matrix.md
    python -m benchmarks.parity_matrix --families internlm2 --rows TP2 CP2

Rows are layouts of the DeepSpeed and the Megatron engine, in fp32 and bf16; controls have one mistake and must not pass. The table
is written as Markdown, and beside it as JSON. Exit code 1: a row is out of bounds, or a control within them.
"""

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    families: tuple[Literal["internlm", "internlm2", "mixtral"], ...] = ("internlm", "internlm2", "mixtral")
    """Model families."""
    rows: tuple[str, ...] = ()
    """Only rows (and controls) whose titles have one of these in them; none: all."""
    steps: int = 20
    """Steps of every row."""
    out: Path | None = None
    """Markdown file for the table; a .json of the same name goes beside it. None: the table is printed only."""


def main() -> int:
    """Measures, prints, writes; 1 when something is not as it should be."""
    options = parser.parse(Options, description=__doc__ or "")
    if options.steps < 2:
        raise UserError(f"--steps {options.steps}: at least 2, as the first one has the learning rate 0")
    if options.out and (options.out.is_dir() or options.out.suffix == ".json"):
        raise UserError(f"--out {options.out}: the name of a Markdown file; a .json goes beside it")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the reference and the worker are those of the tests

    from ascendspeed.distributed import device

    here = device.prepare("cpu")
    importlib.import_module("torch").set_num_threads(1)  # as every rank has

    from ascendspeed.utils.atomic import write_file
    from benchmarks.parity import running, table

    facts = table.about(here.name)
    with tempfile.TemporaryDirectory() as work:
        say = lambda text: print(text, flush=True)  # noqa: E731
        measured = running.measure(options.families, options.rows, options.steps, Path(work), say)
    text = table.as_markdown(measured, facts)
    print(text)
    if options.out:
        write_file(options.out, text)
        write_file(options.out.with_suffix(".json"), table.as_json(measured, facts))
    return 0 if measured.good else 1


if __name__ == "__main__":
    errors.run(main, clean_up=True)
