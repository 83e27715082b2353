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


class _Members(io.RawIOBase):
    """Decompressed content of a file of one or several members, one behind another.

    Python's own readers of xz and bz2 take a damaged member for the end of the file, and the rows behind it
    would be lost.
    """

    def __init__(self, raw: BinaryIO, create_decompressor: Callable[[], Any]) -> None:
        self._raw = raw
        self._create = create_decompressor
        self._decompressor = create_decompressor()
        self._is_at_begin = True

    def readable(self) -> bool:
        """True: see `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer`; returns the number of bytes, 0 at the end. Raises `DAMAGED`."""
        while True:
            compressed = b""
            if self._decompressor.eof:
                compressed = self._next_member(self._decompressor.unused_data)
                if not compressed:
                    return 0
                self._decompressor = self._create()
            elif self._decompressor.needs_input:
                compressed = self._raw.read(io.DEFAULT_BUFFER_SIZE)
                if not compressed and self._is_at_begin:
                    return 0  # an empty file
                if not compressed:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            self._is_at_begin = False
            content = self._decompressor.decompress(compressed, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _next_member(self, compressed: bytes) -> bytes:
        """Returns the first bytes of the next member, behind zeros that fill up a block."""
        while not (begin := compressed.lstrip(b"\0")):
            compressed = self._raw.read(io.DEFAULT_BUFFER_SIZE)
            if not compressed:
                return b""
        return begin


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": _zstandard,
    ".xz": lambda raw: io.BufferedReader(_Members(raw, lzma.LZMADecompressor)),
    ".bz2": lambda raw: io.BufferedReader(_Members(raw, bz2.BZ2Decompressor)),
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
