"""Names in a folder of training checkpoints, by which they are known before anything of them is read. No torch."""

import re
from pathlib import Path

STEP_PATTERN = re.compile(r"step_\d{7,}")
MANIFEST = "manifest.json"
"""Written last into a step's folder."""


def step_name(step: int) -> str:
    """Folder of a step."""
    return f"step_{step:07}"


def read_latest(folder: Path) -> str | None:
    """What `latest` says; None when there is no such file."""
    try:
        return (folder / "latest").read_bytes().decode(errors="replace").strip()
    except OSError:
        return None


def step_folders(folder: Path) -> dict[str, Path]:
    """Step -> folder. One that was being replaced when the save was killed still lies under its other name."""
    found = {p.name[1 : -len(".old")]: p for p in folder.glob(".step_*.old")}
    found |= {p.name: p for p in folder.glob("step_*")}
    return {name: p for name, p in found.items() if STEP_PATTERN.fullmatch(name) and p.is_dir()}


def looks_like_checkpoint(path: str | Path) -> bool:
    """Whether a path holds, or is, a training checkpoint of ours, be it whole, damaged or lost. Looks at names only."""
    path = Path(path)
    if (path / MANIFEST).exists() or (STEP_PATTERN.fullmatch(path.name) and path.is_dir()):
        return True
    return bool(step_folders(path)) or bool(STEP_PATTERN.fullmatch(read_latest(path) or ""))
