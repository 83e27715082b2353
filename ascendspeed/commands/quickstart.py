"""Command `intern quickstart`: runs the quickstart script of the repository."""

import os
from dataclasses import dataclass

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.run_record import ROOT

SCRIPT = ROOT / "examples" / "intern" / "quickstart.sh"


@dataclass(frozen=True)
class QuickstartCommand:
    """Runs examples/intern/quickstart.sh: raw text to a trained, exported, evaluated and fine-tuned model.

    The model is tiny: minutes on a CPU. Settings are environment variables: WORK, the folder; NPROC, the
    processes; STOP and ITERS, the iterations.
    """


def main() -> int:
    """Replaces this process by the script. Raises UserError outside of the repository."""
    parser.parse(QuickstartCommand, description=QuickstartCommand.__doc__ or "")
    if not SCRIPT.is_file():
        raise UserError(
            "the quickstart is a script of the repository, not of the installed package: clone it, run "
            "`pip install -e .` there, then intern quickstart"
        )
    os.execvp("bash", ["bash", str(SCRIPT)])


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()
