"""Recipes with stand-ins for what they start."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import launch

INTERN = launch.ROOT / "examples" / "intern"
GIVEN = {
    "HOSTFILE",
    "RESTARTS",
    "RECIPE",
    "MODEL",
    "DATA",
    "SAVE",
    "CHECKPOINT",
    "TP",
    "PP",
    "DTYPE",
    "NPROC",
    "NNODES",
}
GIVEN |= {"PACKING", "EPOCHS", "LR", "MIN_LR", "WARMUP"}


def clean(**own: str) -> dict[str, str]:
    """An environment in which nobody has given a recipe its values."""
    return {name: value for name, value in launch.environment().items() if name not in GIVEN} | own


def program(folder: Path, name: str, text: str) -> None:
    """An executable `folder`/`name`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def program_python(folder: Path, text: str) -> None:
    """A stand-in for `python` in `folder`: bash code for each program except the launcher, which is real."""
    program(
        folder,
        "python",
        f'''#!/usr/bin/env bash
[ "$1 $2" != "-m ascendspeed.cli.launch" ] || exec "{sys.executable}" "$@"
{text}
''',
    )


def typed(recipe: Path, folder: Path, *flags: str, starter: str = "deepspeed", **env: str) -> list[str]:
    """Flags that a recipe gives to pretrain_intern.py, per launcher; `folder` is for the stand-in."""
    program(folder / "bin", starter, f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/words\n')
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(recipe), *flags], env=clean(PATH=path, **env), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    words = (folder / "words").read_text().splitlines()
    return words[words.index("pretrain_intern.py") + 1 :]
