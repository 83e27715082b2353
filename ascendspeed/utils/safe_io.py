"""Files that others wrote: whether a path may be opened at all, and JSON that is not believed."""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ascendspeed.utils.errors import UserError

MAX_JSON_BYTES = 64 * 2**20
"""Bytes; the largest tokenizer.json in use have some 40 MB."""
POINTER = b"version https://git-lfs.github.com/spec/"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def checked_file(path: str | Path, root: str | Path | None = None) -> Path:
    """The path, when it is a file that may be read. Raises `UserError` for everything else.

    A link may not lead out of `root` (None: the file's own folder): a checkpoint that was unpacked could otherwise make any file
    of this machine a part of itself. The one exception is the cache of huggingface_hub, which consists of such links:
    `snapshots/REVISION/model.safetensors` may lead to `blobs/` of the same repository.
    """
    path = Path(path)
    try:
        real = path.resolve(strict=True)
        home = (Path(root) if root is not None else path.parent).resolve(strict=True)
        kind = os.stat(real).st_mode
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: a NUL in the name; RuntimeError: links in a circle
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    if not any(real.is_relative_to(place) for place in (home, *_blobs(home))):
        raise UserError(f"{path} is a link that leads out of {home}, to {real}: put the file itself there")
    if not stat.S_ISREG(kind):
        raise UserError(f"{path} is a {'directory' if stat.S_ISDIR(kind) else 'device or pipe'}, not a file")
    if not os.access(real, os.R_OK):
        raise UserError(f"{path} cannot be read: no permission")
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{path} is not the file itself, but what git has of it without git-lfs: run git lfs pull there"
            )
    return path


def _blobs(home: Path) -> Iterable[Path]:
    """Where the links of a huggingface_hub cache lead that `home` is in."""
    return (above.parent / "blobs" for above in home.parents if above.name == "snapshots")


def plain_file_name(name: Any, where: str | Path) -> str:
    """A name that another file gives, when it is one of a file in the same folder. Raises `UserError`."""
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or PurePosixPath(name).name != name
        or set(name) & set("\\\0\n")
    ):
        raise UserError(f"{where} names {name!r}, which is not a file of its folder")
    return name


def read_json(path: str | Path, root: str | Path | None = None) -> Any:
    """What a JSON file holds.

    Raises `UserError` when it cannot be read, is too large or too deep, names something twice or holds NaN or infinity.
    """
    path = checked_file(path, root)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(
                f"{path} cannot be read: {size / 2**20:.0f} MiB of JSON are more than any checkpoint needs"
            )
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read, it is not JSON: {error}") from None


def parse_json(text: bytes, finite: bool = True) -> Any:
    """The same for bytes that were read. Raises `ValueError`.

    `finite`: NaN and infinity, which JSON itself has no words for and Python writes all the same, are refused.
    """
    numbers: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite} if finite else {}
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_once, **numbers)
        if SURROGATE.search(text):  # half a character is a string in Python, but no file can hold it
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return values


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        _no_number(digits)
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"it says {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return table


def read_json_object(path: str | Path, root: str | Path | None = None) -> dict[str, Any]:
    """The same, of a file that must hold names and values."""
    table = read_json(path, root)
    if not isinstance(table, dict):
        raise UserError(f"{path} is not a table of names and values")
    return table
