"""Recipes with stand-ins for what they start."""

import os
import subprocess
import sys
from pathlib import Path

from ascendspeed.utils.errors import UserError
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
GIVEN |= {"PACKING", "EPOCHS", "LR", "MIN_LR", "WARMUP", "LOSS", "BETA"}


def clean(**own: str) -> dict[str, str]:
    """An environment in which nobody has given a recipe its values."""
    return {name: value for name, value in launch.environment().items() if name not in GIVEN} | own


INPUTS = {
    "tokenizer.model": ("dataset/internlm", "dataset/internlm2", "tok"),
    "text.idx": (
        "model_weights",
        "weights",
        "there",
        *(f"model_from_hf/{n}" for n in ("internlm-7b", "internlm2-7b")),
    ),
}
PREFIXES = ("dataset/alpaca_text_document", "dataset/alpaca", "dataset/preference", "a", "b")


def inputs(folder: Path) -> Path:
    """Stand-ins for the tokenizers, data and weights that recipes name; the folder, to run them in."""
    for name, places in INPUTS.items():
        for place in places:
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / name).touch()
    for prefix in PREFIXES:
        (folder / f"{prefix}.idx").touch()
    return folder


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
        ["bash", str(recipe), *flags],
        env=clean(PATH=path, **env),
        cwd=inputs(folder),
        capture_output=True,
        text=True,
    )
    if done.returncode == 2 and done.stderr.startswith("error: "):
        raise UserError(done.stderr)
    assert done.returncode == 0, done.stderr
    words = (folder / "words").read_text().splitlines()
    return words[words.index("pretrain_intern.py") + 1 :]
