"""Streaming safetensors files: tensors are written and hashed in chunks, without a second copy in memory."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.utils import safetensors_header
from ascendspeed.utils.atomic import sync_file
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

CHUNK = 4 << 20
"""Elements that are copied from the device, hashed and written at a time."""

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
    """Location of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


class ShardWriter:
    """Writer of one safetensors file.

    Its size is known before it is written; until then its tensors are views.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.tensors = tensors
        specs = {name: (_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        self._header, header = safetensors_header.encode(specs, metadata)
        self.size = header.file_size

    def write(self, path: Path) -> str:
        """Writes and fsyncs; returns the SHA-256 of the bytes in memory, so that a later check finds a
        failing disk.
        """
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
    """Metadata and tensor entries of a safetensors file. Raises `UserError` if it is damaged or truncated."""
    try:
        header = safetensors_header.read(path)
        for name, entry in header.tensors.items():
            _check_entry(name, entry)
        entries = {
            name: TensorEntry(DTYPES[entry["dtype"]], tuple(entry["shape"]), header.offset(name))
            for name, entry in header.tensors.items()
        }
        if header.file_size > os.path.getsize(path):
            raise ValueError("it is cut off")
        if not all(isinstance(text, str) for text in header.metadata.values()):
            raise ValueError("its metadata are not texts")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({first_line(error, 200)})") from error
    return header.metadata, entries


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the shape and the byte range of a tensor agree."""
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**62 for number in (*entry["shape"], begin, end)):
        raise ValueError(f"{name} has the shape {entry['shape']} at {entry['data_offsets']}")
    size = safetensors_header.ITEM_SIZES[entry["dtype"]] * prod(entry["shape"])
    if end - begin != size:
        raise ValueError(f"{name} has {size} bytes by its shape and {end - begin} by its offsets")


def read_into(out: Tensor, path: Path, offset: int) -> None:
    """Fills the contiguous CPU tensor `out` with the bytes from `offset` on.

    Raises `UserError` if the file is too short.
    """
    if not out.numel():
        return
    buffer = memoryview(out.numpy().reshape(-1)).cast("B")
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while buffer:
                count = os.preadv(descriptor, [buffer], offset)
                if not count:
                    raise UserError(f"{path}: ends before byte {offset + len(buffer)}")
                buffer = buffer[count:]
                offset += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
