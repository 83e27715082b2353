"""Validation of untrusted input files: path checks and strict JSON."""

import codecs
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
"""Size limit of a JSON file; the largest tokenizer.json in use have about 40 MB."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HEAD_BYTES = 4096
"""First bytes of a file, by which its kind and encoding are recognised."""
MIN_NULS = 0.3
"""Share of NULs among the bytes of UTF-16, from which on text without a byte order mark counts as such: three
of five characters are ASCII."""
COMPRESSED = {
    "gzip": rb"\x1f\x8b",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "xz": rb"\xfd7zXZ\0",
    "bzip2": rb"BZh[1-9]1AY&SY",
}
"""Program that unpacks a file, and its first bytes."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def checked_file(path: str | Path, root: str | Path | None = None) -> Path:
    """Returns the path if it is a readable regular file. Raises `UserError` otherwise.

    A link may not point outside `root` (None: the file's own folder): else an unpacked checkpoint could
    include any file of this machine. One exception is the cache of huggingface_hub, which consists of such
    links: `snapshots/REVISION/model.safetensors` may point to `blobs/` of the same repository.
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
    if not any(real.is_relative_to(folder) for folder in (home, *_blob_folders(home))):
        raise UserError(f"{path} is a link that leads out of {home}, to {real}: put the file itself there")
    if not stat.S_ISREG(kind):
        raise UserError(f"{path} is a {'directory' if stat.S_ISDIR(kind) else 'device or pipe'}, not a file")
    if not os.access(real, os.R_OK):
        raise UserError(f"{path} cannot be read: no permission")
    with open(path, "rb") as file:
        refuse_lfs_pointer(path, file.read(len(LFS_POINTER)))
    return path


def checked_text(path: str | Path) -> Path:
    """Returns the path of a text file as `checked_file` does. Raises `UserError` also for UTF-16 and for
    compressed text.
    """
    path = checked_file(path)
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    refuse_compressed(path, head)
    refuse_utf16(path, head)
    return path


def refuse_lfs_pointer(path: str | Path, head: bytes) -> None:
    """Raises `UserError` if `head`, the first bytes of a file, are what git has in place of a large file."""
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
        )


def refuse_compressed(path: str | Path, head: bytes) -> None:
    """Raises `UserError` if `head`, the first bytes of a text file, are those of a compressed one."""
    for program, magic in COMPRESSED.items():
        if re.match(magic, head):
            raise UserError(f"{path} is compressed, and plain text is read here: {program} -d unpacks it")


def refuse_utf16(path: str | Path, head: bytes) -> None:
    """Raises `UserError` if `head`, the first bytes of a text file, are UTF-16 or UTF-32, by their byte order
    mark or by a NUL in every other byte."""
    encoding = _wide_encoding(head)
    if encoding:
        raise UserError(
            f"{path} is {encoding}, as PowerShell's `>` and Windows editors write it: "
            f"iconv -f {encoding} -t UTF-8 makes it readable"
        )


def refuse_carriage_returns(path: str | Path, chunks: Iterable[bytes]) -> None:
    """Raises `UserError` if the lines of a text, given in chunks, end with carriage returns alone: it would
    be read as a single line."""
    behind = b""
    has_return = False
    for chunk in chunks:
        if b"\n" in chunk:
            return
        _, separator, rest = chunk.partition(b"\r")
        behind += (chunk if has_return else rest).strip()[:1]
        has_return |= bool(separator)
    if has_return and behind:
        raise UserError(
            f"{path} has a carriage return at the end of a line in place of a line feed: "
            "tr '\\r' '\\n' makes it readable"
        )


def _wide_encoding(head: bytes) -> str:
    """Encoding of text whose characters take two or four bytes; empty for any other."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    for first, others in ((0, 1), (1, 0)):  # big-endian, little-endian
        if head[first::2].count(0) > MIN_NULS * len(head) and not head[others::2].count(0):
            return "UTF-16BE" if first == 0 else "UTF-16LE"
    return ""


def _blob_folders(home: Path) -> Iterable[Path]:
    """Targets of the links in a huggingface_hub cache that contains `home`."""
    return (parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")


def plain_file_name(name: Any, where: str | Path) -> str:
    """Returns `name`, read from the file `where`, if it names a file of the same folder.

    Raises `UserError` otherwise.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or PurePosixPath(name).name != name
        or set(name) & set("\\\0\n")
    ):
        raise UserError(f"{where} names {repr(name)[:200]}, which is not a file of its folder")
    return name


def read_json(path: str | Path, root: str | Path | None = None) -> Any:
    """Reads a JSON file.

    Raises `UserError` if it cannot be read, is too large or nested too deeply, repeats a key, or holds NaN or
    infinity.
    """
    path = checked_file(path, root)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(
                f"{path} cannot be read: {size / 2**20:.0f} MiB of JSON is more than any checkpoint needs"
            )
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read, it is not JSON: {error}") from None


def parse_json(text: bytes, finite: bool = True) -> Any:
    """Parses JSON with the checks of `read_json`. Raises `ValueError`.

    `finite`: refuse NaN and infinity, which are not JSON but which Python's writer emits.
    """
    numbers: dict[str, Any] = (
        {"parse_constant": _refuse_constant, "parse_float": _finite_float} if finite else {}
    )
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, **numbers)
        if SURROGATE.search(text):  # a lone surrogate is a string in Python, but cannot be encoded
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return values


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        _refuse_constant(digits)
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has the key {repeated!r} twice")
    return table


def read_json_object(path: str | Path, root: str | Path | None = None) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object.

    Raises `UserError` as `read_json` does, or if it is something else.
    """
    table = read_json(path, root)
    if not isinstance(table, dict):
        raise UserError(f"{path} is not a table of names and values")
    return table
