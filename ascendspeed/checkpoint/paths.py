"""Names of files and folders of training checkpoints; detects checkpoints by name alone. Imports no torch."""

import re
from pathlib import Path

from ascendspeed.utils.text import shorten_list

STEP_PATTERN = re.compile(r"step_\d{7,}")
SHARD_PREFIX = "shard-"
"""Beginning of the name of a rank's file of tensors in the folder of a step."""
MANIFEST = "manifest.json"
"""File that is written last into the folder of a step."""


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:07}"


def read_latest(folder: Path) -> str | None:
    """Content of the file `latest`; None if it does not exist. Raises `PermissionError`."""
    try:
        return (folder / "latest").read_bytes().decode(errors="replace").strip()
    except PermissionError:
        raise
    except OSError:
        return None


def step_folders(folder: Path) -> dict[str, Path]:
    """Name of a step -> its folder; a save killed while it replaced a step leaves that step under
    `.step_*.old`. Raises `PermissionError` for a folder that cannot be listed, which `glob` would pass over.
    """
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    folders = {path.name[1 : -len(".old")]: path for path in paths if path.match(".step_*.old")}
    folders |= {path.name: path for path in paths if path.match("step_*")}
    return {name: path for name, path in folders.items() if STEP_PATTERN.fullmatch(name) and path.is_dir()}


def describe_missing(path: str | Path) -> str:
    """Text about a folder that does not exist; for a step, with the steps that there are."""
    path = Path(path)
    if path.is_file():
        return f"{path} is not a directory; give its folder, {path.parent}"
    if path.exists() or not path.name.startswith("step_") or not path.parent.is_dir():
        return f"{path} is not a directory"
    steps = shorten_list(sorted(step_folders(path.parent), reverse=True)) or "no steps"
    return f"there is no {path.name} in {path.parent}; there are {steps}"


def looks_like_checkpoint(path: str | Path) -> bool:
    """True if a path is a training checkpoint, or a folder of them, complete or damaged.

    Looks at names only.
    """
    path = Path(path)
    if (path / MANIFEST).exists() or (STEP_PATTERN.fullmatch(path.name) and path.is_dir()):
        return True
    return bool(step_folders(path)) or bool(STEP_PATTERN.fullmatch(read_latest(path) or ""))
