"""Command `intern report`: writes the page of a run from its log, also beside another run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ascendspeed.cli import parser
from ascendspeed.run_report import page
from ascendspeed.run_report.run_log import read_run
from ascendspeed.utils import errors


@dataclass(frozen=True)
class ReportCommand:
    """Writes the page of a training run: curves, events, checkpoints, settings.

    intern report logs --against logs_other --output compare.html
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Folder of --log-dir, or a train.log."""
    against: str | None = None
    """Folder or log of another run: its curves are drawn beside, and settings that differ are listed."""
    output: str | None = None
    """File to write; None: run.html beside the log, or with --against run-against.html."""


def main() -> int:
    """Reads, writes, and prints the path and what differs."""
    options = parser.parse(ReportCommand, description=ReportCommand.__doc__ or "")
    run = read_run(options.run)
    against = read_run(options.against) if options.against else None
    name = "run-against.html" if against else page.PAGE_NAME
    path = Path(options.output) if options.output else run.path.parent / name
    page.write_page(path, run, against)
    if against:
        for setting, ours, theirs in page.differences(run, against):
            print(f"{setting}: {ours} | {theirs}")
    print(path)
    return 0


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()
