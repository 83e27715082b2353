"""Checks the installed packages against the ranges of this project."""

import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

import ascendspeed
from ascendspeed.commands.doctor_checks.check import Check
from ascendspeed.utils.run_record import ROOT, commit

NAME = "ascendspeed"
LEAST_PYTHON = (3, 11)
EXTRAS = ("", "eval", "serve", "streaming")
"""Extras that are checked, and the requirements without one."""


def check_packages() -> Iterator[Check]:
    """Yields the versions of Python, of this project, and of what it depends on."""
    python = ".".join(map(str, sys.version_info[:3]))
    too_old = sys.version_info < LEAST_PYTHON
    remedy = "install Python 3.11 or newer, then make a new environment: python3.12 -m venv .venv"
    yield Check(
        "python", "error" if too_old else "ok", f"{python} ({sys.executable})", remedy if too_old else ""
    )
    yield Check(NAME, "ok", f"{ascendspeed.__version__}, commit {commit()}, {ROOT}")
    for extra, requirement in requirements():
        yield check_requirement(requirement, extra)


def requirements() -> list[tuple[str, Requirement]]:
    """(extra or "", requirement) of this project: of pyproject.toml beside the package, else as installed."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text())["project"]
        texts = [("", text) for text in project["dependencies"]]
        texts += [(name, text) for name, extra in project["optional-dependencies"].items() for text in extra]
    else:
        texts = [_divide(text) for text in metadata.requires(NAME) or ()]
    parsed = [(extra, Requirement(text)) for extra, text in texts if extra in EXTRAS]
    return [(extra, requirement) for extra, requirement in parsed if requirement.name != NAME]


def _divide(text: str) -> tuple[str, str]:
    """(extra, requirement without the condition on it) of a line of the metadata."""
    requirement, _, condition = text.partition(";")
    extra = condition.rpartition("extra ==")[2].strip(" \"'") if "extra" in condition else ""
    return extra, requirement


def check_requirement(requirement: Requirement, extra: str = "") -> Check:
    """Compares the installed version with the range."""
    name = f"{requirement.name} [{extra}]" if extra else requirement.name
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(name, "info" if extra else "error", "not installed", f"pip install '{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(
            name, "warning", f"{version}; tested: {requirement.specifier}", f"pip install '{wanted}'"
        )
    return Check(name, "ok", version)
