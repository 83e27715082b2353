"""Files that are written piece by piece and appear whole or not at all."""

import fcntl
import json
import math
import os
import shutil
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ascendspeed.utils.errors import UserError

SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The element types of weights, by their names in a safetensors header; others are refused."""

MARK = ".unfinished"
"""In a folder that is being written: says that it may be cleared."""

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""What a file will hold: name -> (type, shape)."""


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


def write_json(path: Path, values: Any) -> None:
    """Indented, as Hugging Face writes them."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class PieceFile:
    """A file whose size and layout are known before its tensors are: rows are written in any order, by any thread."""

    def __init__(self, path: Path, specs: Specs, offsets: Mapping[str, int]) -> None:
        self.path, self.specs, self.offsets = path, specs, offsets
        self._left, self._lock = set(specs), threading.Lock()
        self._descriptor: int | None = None

    def write(self, name: str, row: int, block: Tensor) -> None:
        """Puts whole rows, of the tensor's own type, from row `row` on; rows that nobody writes are zero."""
        dtype, shape = self.specs[name]
        width = math.prod(shape[1:]) * dtype.itemsize
        if block.dtype != dtype or block.nbytes % width or row * width + block.nbytes > nbytes(dtype, shape):
            raise AssertionError(
                f"{list(block.shape)} {block.dtype} at row {row} of {name}, which is {list(shape)} {dtype}"
            )
        view = memoryview(block.contiguous().flatten().view(torch.uint8).numpy())
        offset = self.offsets[name] + row * width
        descriptor = self._open()
        while view:  # the system writes at most 2 GiB at a time
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written

    def done(self, name: str) -> None:
        """Says that a tensor is there; after the last one, waits until everything is on the disk."""
        with self._lock:
            self._left.remove(name)
            last = not self._left
        if last:
            os.fsync(self._open())
            self.close()

    def close(self) -> None:
        """Also one that is not whole."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """At the first write: a model may have more files than a process may have open."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY)
            return self._descriptor


def create_safetensors(path: Path, specs: Specs) -> PieceFile:
    """A safetensors file with its header and with room for the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return PieceFile(path, specs, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in specs})


def create_pt(path: Path, specs: Specs, around: Callable[[dict[str, Tensor]], Any]) -> PieceFile:
    """A file for `torch.load` that holds `around(tensors)`, with room for the tensors.

    Its pickle is made from tensors without storage. The zip's checksums stay 0: torch does not read them, `unzip` complains.
    """
    with FakeTensorMode():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(around(tensors), path)
    return PieceFile(path, specs, _record_offsets(path, specs))


def _record_offsets(path: Path, specs: Specs) -> dict[str, int]:
    """Where the bytes of each tensor start: torch.save numbers its records in the order in which it meets the tensors."""
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
            )  # of the zip format: ends with the lengths of the name and of the extra field
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            offsets[name] = info.header_offset + 30 + name_length + extra_length
    return offsets


def unused(target: str | Path) -> Path:
    """The absolute path of a folder to write. Raises `UserError` when something is there: to be asked before any other work too."""
    target = Path(os.path.abspath(target))
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target} exists and is not an empty directory: remove it, or choose another")
    return target


def draft_of(target: Path) -> Path:
    """Where `staged` writes."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def staged(target: Path, needed: int) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it becomes `target` when the block ends well, and goes away when not.

    A killed writer leaves only the hidden folder, which the next one clears. Raises `UserError` when `target` holds something,
    when another process is writing it, or when the disk has less than `needed` bytes left.
    """
    target = unused(target)
    draft = draft_of(target)
    if draft.is_symlink() or (
        draft.exists() and not (draft.is_dir() and ((draft / MARK).exists() or not any(draft.iterdir())))
    ):
        raise UserError(
            f"{draft} is in the way, and no conversion left it: move it away, or choose another target"
        )
    try:
        draft.mkdir(parents=True, exist_ok=True)
        lock = _lock(draft)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    try:
        _clear(draft)
        (draft / MARK).touch()
        free = shutil.disk_usage(draft).free
        if free < needed:
            raise UserError(
                f"{target} needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free"
            )
        yield draft
        (draft / MARK).unlink()
        _sync(draft)
        os.rename(draft, target)
        _sync_one(target.parent)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{target} cannot be written: {error}") from error
        raise
    finally:
        os.close(lock)


def _lock(draft: Path) -> int:
    lock = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino != draft.stat().st_ino:  # the other one has just finished, and renamed it
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        raise UserError(f"another process is writing {draft}: wait for it") from None
    except OSError:
        pass  # a file system without locks
    return lock


def _clear(draft: Path) -> None:
    left = list(draft.iterdir())
    if left:
        print(f"starting again: {draft} was left by a conversion that was stopped", flush=True)
    for path in sorted(
        left, key=lambda path: path.name == MARK
    ):  # the mark last: killed here, it is still ours
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
