"""Prints the performance table: rows from logs, then the published rows.

python tools/perf_table.py logs/train.log [ANOTHER ...] [--no-published] [--markdown] [--output FILE]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ascendspeed.cli import parser
from ascendspeed.loss_compare import performance_table, read_logs
from ascendspeed.utils import errors
from ascendspeed.utils.atomic import write_file


@dataclass(frozen=True)
class Options:
    """Flags of perf_table.py."""

    logs: Annotated[Positional[tuple[str, ...]], arg(metavar="LOG...")]
    """Logs in any format that compare_loss.py reads."""
    devices: int | None = None
    """Number of devices, for logs that lack it (this project's have it)."""
    warmup: int = 5
    """Steps to skip at the beginning."""
    published: bool = True
    """Rows of the published page below those of the logs, with footnotes on its errors."""
    markdown: bool = False
    """Print Markdown instead of text."""
    out: Annotated[str | None, parser.output_flag("out")] = None
    """File to write the table to, beside printing it."""


def main() -> None:
    """Reads the logs and prints the table."""
    options = parser.parse(Options, description=__doc__ or "")
    if not options.logs or options.warmup < 0 or (options.devices is not None and options.devices < 1):
        raise errors.UserError("give at least one LOG; --warmup must be 0 or more and --devices at least 1")
    rows = [
        performance_table.performance_row(read_logs.read_log(log), options.devices, options.warmup)
        for log in options.logs
    ]
    published = performance_table.PUBLISHED if options.published else ()
    text = performance_table.format_table([*rows, *published], options.markdown)
    print(text)
    if options.out:
        write_file(Path(options.out), text + "\n")


if __name__ == "__main__":
    errors.run(main)
