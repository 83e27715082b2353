"""Files that are whole or not there, and safetensors written as a stream: hashed on the way, never a second copy in memory."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ascendspeed.utils import safetensors_header
from ascendspeed.utils.atomic import sync_file
from ascendspeed.utils.errors import UserError

CHUNK = 4 << 20
"""Elements that leave the device, are hashed and are written at a time."""

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
class TensorEntry:
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


class ShardWriter:
    """One safetensors file to be: its size is known before it is written, and its tensors stay live views until then."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.tensors = tensors
        specs = {name: (_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        self._header, header = safetensors_header.encode(specs, metadata)
        self.size = header.file_size

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
            sync_file(file)
        return sha.hexdigest()


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Metadata and entries of a safetensors file. Raises `UserError` when it is not one, or is cut off."""
    try:
        header = safetensors_header.read(path)
        entries = {
            name: TensorEntry(DTYPES[entry["dtype"]], tuple(entry["shape"]), header.offset(name))
            for name, entry in header.tensors.items()
        }
        if header.file_size > os.path.getsize(path):
            raise ValueError("it is cut off")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    return header.metadata, entries


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
