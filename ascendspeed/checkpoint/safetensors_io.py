"""Files that are whole or not there, and safetensors written as a stream: hashed on the way, never a second copy in memory."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ascendspeed.utils.errors import UserError

CHUNK = 4 << 20
"""Elements that leave the device, are hashed and are written at a time."""
MAX_HEADER = 100_000_000
"""Bytes of header that the safetensors library accepts."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


class Shard:
    """One safetensors file to be: its size is known before it is written, and its tensors stay live views until then."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.tensors = tensors
        header, end = {"__metadata__": dict(metadata)}, 0
        for key, t in tensors.items():
            start, end = end, end + t.numel() * t.element_size()
            header[key] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER:
            raise ValueError(
                f"a shard of {len(tensors)} tensors has a header of {len(text)} bytes, more than safetensors allows"
            )
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end

    def write(self, path: Path) -> str:
        """Writes and fsyncs; returns the SHA-256 of what was meant to be written."""
        sha = hashlib.sha256(self._header)
        with open(path, "wb") as file:
            file.write(self._header)
            for t in self.tensors.values():
                for chunk in t.detach().reshape(-1).split(CHUNK) if t.numel() else ():
                    data = memoryview(chunk.cpu().numpy()).cast("B")
                    sha.update(data)
                    file.write(data)
            sync(file)
        return sha.hexdigest()


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries of a safetensors file. Raises `UserError` when it is not one, or is cut off."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        metadata, start, size = header.pop("__metadata__", {}), 8 + length, os.path.getsize(path)
        entries = {
            k: Entry(DTYPES[e["dtype"]], tuple(e["shape"]), start + e["data_offsets"][0])
            for k, e in header.items()
        }
        if any(start + e["data_offsets"][1] > size for e in header.values()):
            raise ValueError("it is cut off")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    return metadata, entries


def read_into(out: Tensor, path: Path, offset: int) -> None:
    """Fills the contiguous CPU tensor `out` with the bytes from `offset` on. Raises `UserError` when they are not there."""
    if not out.numel():
        return
    left = memoryview(out.numpy().reshape(-1)).cast("B")
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            while left:
                got = os.preadv(fd, [left], offset)
                if not got:
                    raise UserError(f"{path}: ends before byte {offset + len(left)}")
                left, offset = left[got:], offset + got
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replaces a small file atomically and durably."""
    stage_text(path, text)()


def stage_text(path: Path, text: str) -> Callable[[], None]:
    """Writes all that needs space beside `path`; calling the result puts it in place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        sync(file)

    def commit() -> None:
        os.replace(temporary, path)
        sync_folder(path.parent)

    return commit


def sync(file) -> None:
    """Everything written so far is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
