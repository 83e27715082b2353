"""Command `intern doctor`: checks the installation and the machine, and names what mends a fault."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import ascendspeed
from ascendspeed.cli import parser
from ascendspeed.commands.doctor_checks.check import Check
from ascendspeed.utils import errors

MARKS = {"ok": "ok", "info": "info", "warning": "WARNING", "error": "ERROR"}
EXIT_FAULT = 1


@dataclass(frozen=True)
class DoctorCommand:
    """Checks versions, devices, drivers, disks, shared memory and limits.

    Exit code 0: training can start; 1: an error was found, whose line names the command that mends it.
    """

    json: bool = False
    """Print one JSON object instead of the table."""


def run_checks() -> list[Check]:
    """Runs every check."""
    from ascendspeed.commands.doctor_checks import devices, machine, packages

    return [*packages.check_packages(), *devices.check_devices(), *machine.check_machine()]


def as_text(checks: Sequence[Check]) -> str:
    """Returns the table, with a summary."""
    lines = []
    for check in checks:
        lines.append(f"{MARKS[check.status]:8}{check.name:26}{check.value}")
        if check.remedy:
            lines.append(f"{'':8}{'':26}-> {check.remedy}")
    errors_found = sum(check.status == "error" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    lines.append(f"{errors_found} errors, {warnings} warnings")
    return "\n".join(lines)


def main() -> int:
    """Checks and prints; returns 1 if there is an error."""
    options = parser.parse(DoctorCommand, description=DoctorCommand.__doc__ or "")
    checks = run_checks()
    failed = any(check.status == "error" for check in checks)
    if options.json:
        values = {"version": ascendspeed.__version__, "ok": not failed, "checks": [asdict(c) for c in checks]}
        print(json.dumps(values, indent=1, ensure_ascii=False))
    else:
        print(as_text(checks))
    return EXIT_FAULT if failed else 0


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()
