"""The published performance table from logs, beside the published figures.

python tools/perf_table.py logs/train.log [ANOTHER ...] [--markdown] [--out FILE]
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
    """Flags of this tool."""

    logs: Annotated[Positional[tuple[str, ...]], arg(metavar="LOG...")]
    """Logs of any kind that compare_loss.py reads."""
    devices: int | None = None
    """Devices of the runs, where their logs do not say (this project's do)."""
    warmup: int = 5
    """Steps at the beginning that do not count."""
    markdown: bool = False
    """Markdown instead of text."""
    out: str | None = None
    """File to write the table to as well."""


def main() -> None:
    """Reads, computes, prints."""
    options = parser.parse(Options, description=__doc__ or "")
    if not options.logs or options.warmup < 0 or (options.devices is not None and options.devices < 1):
        raise errors.UserError("give at least one LOG; --warmup must be 0 or more and --devices at least 1")
    rows = [
        performance_table.of_curve(read_logs.read(log), options.devices, options.warmup)
        for log in options.logs
    ]
    text = performance_table.table([*performance_table.PUBLISHED, *rows], options.markdown)
    print(text)
    if options.out:
        write_file(Path(options.out), text + "\n")


if __name__ == "__main__":
    errors.run(main)
