"""Preallocated safetensors and torch files, whose tensors are written in blocks, in any order and by any
thread.
"""

import errno
import json
import math
import mmap
import os
import resource
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.utils import safetensors_header
from ascendspeed.utils.text import first_line

SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Supported element types of weights and their names in a safetensors header."""

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensors of a file to write: name -> (type, shape)."""


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


def write_json(path: Path, values: Any) -> None:
    """Writes JSON with an indentation of 2, as Hugging Face does."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class PreallocatedFile:
    """A file of known size and layout whose rows are written in any order, by any thread."""

    def __init__(self, path: Path, specs: Specs, offsets: Mapping[str, int]) -> None:
        self.path = path
        self.specs = specs
        self.offsets = offsets
        self._unwritten = set(specs)
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def write(self, name: str, row: int, block: Tensor) -> None:
        """Writes whole rows, in the tensor's own type, from row `row` on; rows that are never written are
        zero.
        """
        dtype, shape = self.specs[name]
        width = math.prod(shape[1:]) * dtype.itemsize
        if block.dtype != dtype or block.nbytes % width or row * width + block.nbytes > nbytes(dtype, shape):
            raise AssertionError(
                f"{list(block.shape)} {block.dtype} at row {row} of {name}, which is {list(shape)} {dtype}"
            )
        view = memoryview(block.contiguous().flatten().view(torch.uint8).numpy())
        for offset, piece in self.pieces(name, row * width, view):
            self.write_bytes(offset, piece)

    def pieces(self, name: str, begin: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yields (offset in the file, bytes) of a range of a tensor that begins at its byte `begin`."""
        yield self.offsets[name] + begin, view

    def write_bytes(self, offset: int, view: memoryview) -> None:
        """Writes bytes at an offset of the file; the disk begins with them at once, not at the last fsync."""
        descriptor = self._open()
        while view:  # the system writes at most 2 GiB at a time
            written = os.pwrite(descriptor, view, offset)
            os.posix_fadvise(descriptor, offset, written, os.POSIX_FADV_DONTNEED)
            view = view[written:]
            offset += written

    def done(self, name: str) -> None:
        """Marks a tensor as complete; after the last one, flushes the file to the disk and closes it."""
        with self._lock:
            self._unwritten.remove(name)
            complete = not self._unwritten
        if complete:
            os.fsync(self._open())
            self.close()

    def close(self) -> None:
        """Closes the file, complete or not."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """Opens the file at the first write: a model may have more files than a process may have open."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY)
            return self._descriptor


def create_safetensors(path: Path, specs: Specs) -> PreallocatedFile:
    """Creates a safetensors file with its header and with space for the tensors."""
    named = {name: (SAFETENSORS_TYPES[dtype], shape) for name, (dtype, shape) in specs.items()}
    first_bytes, header = safetensors_header.encode(named, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(first_bytes)
        file.truncate(header.file_size)
    return PreallocatedFile(path, specs, {name: header.offset(name) for name in specs})


def create_pt(path: Path, specs: Specs, wrap: Callable[[dict[str, Tensor]], Any]) -> PreallocatedFile:
    """Creates a file for `torch.load` that holds `wrap(tensors)`, with space for the tensors.

    Its pickle comes from tensors that are never filled. The zip's checksums stay 0: torch does not read them,
    `unzip` complains.
    """
    with torch.serialization.skip_data():
        save_pt(wrap(_unfilled_tensors(specs)), path)
    return PreallocatedFile(path, specs, _record_offsets(path, specs))


def save_pt(content: Any, path: Path) -> None:
    """Calls `torch.save`. Raises `OSError`, also where torch raises an error of its own, which names neither
    the file nor the cause: the disk is full, or files may not be so large."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        allowed = "" if limit == resource.RLIM_INFINITY else f"; a file may have {limit:,} bytes (ulimit -f)"
        reason = f"torch could not write {path.name} ({first_line(error)}){allowed}"
        raise OSError(errno.ENOSPC, reason, str(path)) from error


def _unfilled_tensors(specs: Specs) -> dict[str, Tensor]:
    """Tensors that take no memory: all of one type view the same address range, which is never touched.

    Each has a storage of its own, so that `torch.save` makes a record for it. Fake tensors would do the same,
    but their first use imports for a second.
    """
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in specs.values():
        sizes[dtype] = max(sizes.get(dtype, 1), nbytes(dtype, shape))
    ranges = {dtype: mmap.mmap(-1, size, mmap.MAP_PRIVATE) for dtype, size in sizes.items()}
    return {
        name: torch.frombuffer(ranges[dtype], dtype=dtype, count=numel).view(shape)
        if (numel := math.prod(shape))
        else torch.empty(shape, dtype=dtype)
        for name, (dtype, shape) in specs.items()
    }


def _record_offsets(path: Path, specs: Specs) -> dict[str, int]:
    """Offset of each tensor's bytes: torch.save numbers its records in the order of the tensors."""
    offsets = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {info.filename.split("/", 1)[1]: info for info in archive.infolist()}
        for number, (name, (dtype, shape)) in enumerate(specs.items()):
            info = records[f"data/{number}"]
            if info.file_size != nbytes(dtype, shape):
                raise AssertionError(
                    f"{path}: record {number} has {info.file_size} bytes, not those of {name}"
                )
            file.seek(info.header_offset)
            header = file.read(
                30
            )  # of the zip format; ends with the lengths of the name and of the extra field
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            offsets[name] = info.header_offset + 30 + name_length + extra_length
    return offsets
