"""manifest.json: size and SHA-256 of every file of a checkpoint, and its own SHA-256."""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from ascendspeed.checkpoint import safetensors_io
from ascendspeed.checkpoint.paths import MANIFEST, SHARD_PREFIX
from ascendspeed.utils.errors import FILE_ERRORS
from ascendspeed.utils.safe_io import parse_json

UNREADABLE = "cannot be read: "
"""Mark of a problem that is not damage: the file may be whole, so no older checkpoint must replace it."""
NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
THREADS = 4
"""Files that a rank hashes at the same time, at most."""


def manifest_text(step: int, listed: Mapping[str, Mapping[str, Any]]) -> str:
    """Text of manifest.json; `listed`: file name -> {"size": bytes, "sha256": hex digits}."""
    body = {"step": step, "files": {name: dict(listed[name]) for name in sorted(listed)}}
    sha256 = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": sha256}, indent=1) + "\n"


def find_problems(folder: Path, rank: int = 0, world: int = 1) -> list[str]:
    """Problems of a step's folder, each with its file; empty if every byte is as it was written.

    Every rank checks all sizes; hashing is divided by `share_of_rank`.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        table = parse_json(content)
        listed, step = table["files"], table["step"]
        if content != manifest_text(step, listed).encode():
            return [f"{MANIFEST}: it was changed after it was written"]
        _check_list(listed, step)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing, so the save never ended or the file was deleted"]
    except OSError as error:
        return [f"{MANIFEST}: {_reason(error)}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: not a manifest (empty, cut off or overwritten)"]
    if re.fullmatch(r"step_\d+", folder.name) and int(folder.name[5:]) != step:
        return [f"{MANIFEST}: it is of step {step}"]
    problems = {name: _size_problem(folder / name, entry["size"]) for name, entry in listed.items()}
    if not any(problems.values()):
        share = share_of_rank(list(listed), rank, world)
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # hashing does not hold the GIL
            hashed = pool.map(lambda name: _hash_problem(folder / name, listed[name]["sha256"]), share)
            problems = dict(zip(share, hashed, strict=True))
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def share_of_rank(names: Sequence[str], rank: int, world: int) -> list[str]:
    """Files that a rank hashes: its own shard, or its share of the shards of another number of ranks; rank 0
    also all other files.

    A resumed run reads the same shard next, from the page cache of its node: storage delivers it once.
    """
    shards = sorted(name for name in names if name.startswith(SHARD_PREFIX))
    own = shards[len(shards) * rank // world : len(shards) * (rank + 1) // world]
    return own if rank else own + [name for name in names if not name.startswith(SHARD_PREFIX)]


def _check_list(listed: Mapping[str, Any], step: Any) -> None:
    """Raises `ValueError` unless a manifest lists files of its folder, whoever wrote it."""
    sizes = [step, *(entry["size"] for entry in listed.values())]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("it has other things than sizes")
    if not all(PurePath(name).name == name and name.isprintable() and name != ".." for name in listed):
        raise ValueError("it has names outside its folder")
    if not all(isinstance(entry["sha256"], str) for entry in listed.values()):
        raise ValueError("it has other things than hashes")


def folder_size(folder: Path) -> int:
    """Total size in bytes of the files in a folder; 0 if it cannot be read, which `find_problems` reports."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except OSError:
        return 0


def _size_problem(path: Path, expected: int) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else _reason(error)
    if not stat.S_ISREG(status.st_mode):
        return "not a file, but a device, pipe or directory"
    return None if status.st_size == expected else f"{status.st_size} bytes instead of {expected}"


def _hash_problem(path: Path, expected: str) -> str | None:
    try:
        if safetensors_io.file_sha256(path) != expected:
            return "its SHA-256 is not the one in the manifest: damaged, or another file"
        return None
    except OSError as error:
        return _reason(error)


def _reason(error: OSError) -> str:
    reason = FILE_ERRORS.get(error.errno or 0) or error.strerror or str(error)
    return UNREADABLE + reason if error.errno in NOT_DAMAGE else reason
