"""manifest.json: size and SHA-256 of every file of a checkpoint, and of itself; written last."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascendspeed.checkpoint import safetensors_io
from ascendspeed.checkpoint.paths import MANIFEST


def manifest_text(step: int, listed: Mapping[str, Mapping[str, Any]]) -> str:
    """The file's text; `listed`: name -> {"size": bytes, "sha256": hex}."""
    body = {"step": step, "files": {name: dict(listed[name]) for name in sorted(listed)}}
    own = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": own}, indent=1) + "\n"


def find_problems(folder: Path, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with a step's folder, each naming its file; empty when every byte is as it was written.

    Sizes are looked at by every rank, and the hashing is shared: rank r of w takes the files r, r + w, ...
    """
    try:
        said = (folder / MANIFEST).read_text()
        listed = json.loads(said)["files"]
        step = json.loads(said)["step"]
        if said != manifest_text(step, listed):
            return [f"{MANIFEST}: it was changed after it was written"]
    except FileNotFoundError:
        return [f"{MANIFEST}: missing, so the save never ended or the file was deleted"]
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: not a manifest (empty, cut off or overwritten)"]
    if re.fullmatch(r"step_\d+", folder.name) and int(folder.name[5:]) != step:
        return [f"{MANIFEST}: it is of step {step}"]
    wrong = {name: _size_problem(folder / name, entry["size"]) for name, entry in listed.items()}
    if not any(wrong.values()):
        wrong = {
            name: _hash_problem(folder / name, listed[name]["sha256"]) for name in list(listed)[rank::world]
        }
    return [f"{name}: {problem}" for name, problem in wrong.items() if problem]


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _size_problem(path: Path, expected: int) -> str | None:
    try:
        found = path.stat().st_size
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else error.strerror
    return None if found == expected else f"{found} bytes instead of {expected}"


def _hash_problem(path: Path, expected: str) -> str | None:
    try:
        return (
            None
            if safetensors_io.file_sha256(path) == expected
            else "its SHA-256 is not the one in the manifest: damaged, or another file"
        )
    except OSError as error:
        return error.strerror
