"""Opens text files that may be compressed; compressed ones can only be read from their beginning."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from ascendspeed.utils.safe_io import HEAD_BYTES, refuse_lfs_pointer, refuse_utf16


def _zstandard(raw: BinaryIO) -> BinaryIO:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": _zstandard,
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
"""Last suffix -> function that wraps an open file; all of them read files of several members."""
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""Exceptions of reading compressed files."""


def compression_of(path: Path) -> str:
    """Returns the suffix of a compressed file; empty if it is not compressed."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


@contextmanager
def open_text(path: Path) -> Iterator[tuple[IO[bytes], BinaryIO]]:
    """Opens a file; gives its decompressed content, and the raw file, whose position tells the progress."""
    with path.open("rb") as raw:
        compression = compression_of(path)
        if not compression:
            yield raw, raw
            return
        with COMPRESSIONS[compression](raw) as file:
            yield file, raw


def read_head(path: Path, is_text: bool = True) -> bytes:
    """Returns the first bytes of the content.

    Raises `UserError` for a Git LFS pointer and for text in UTF-16, `DAMAGED` for what cannot be read.
    """
    with path.open("rb") as raw:
        refuse_lfs_pointer(path, raw.read(HEAD_BYTES))
    with open_text(path) as (file, _):
        head = file.read(HEAD_BYTES)
    if is_text:
        refuse_utf16(path, head)
    return head
