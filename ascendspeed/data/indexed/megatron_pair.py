"""Megatron's indexed data set, P.bin and P.idx: written so that a pair that opens is whole.

P.bin holds the ids of all documents one after the other. P.idx, little-endian: `MMIDIDX\\0\\0`, uint64 version 1, uint8 type code,
uint64 number of sequences n, uint64 n + 1, int32 lengths [n], int64 byte offsets [n], int64 document bounds [n + 1].

`PairWriter` writes beside the old files and takes their place at the end: the old .idx goes first, the new one comes last, and
nothing opens a pair without its .idx. Killed at any moment it leaves the old pair, no pair, or the new one.
A third file, P.meta (JSON, but not called so: it may lie in a folder of input), says what the data is; whoever trains on it
checks the vocabulary by it.
"""

import contextlib
import fcntl
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from ascendspeed.utils.atomic import sync_file, sync_path
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

MAGIC, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of one id for every integer type code that Megatron knows."""
MAX_LISTED = 10
"""Prefixes that are said."""
UINT16_BELOW = 65500
"""Megatron's bound, not 65,536: the same vocabulary gives the same files."""


def dtype_for(vocab_size: int) -> np.dtype:
    """The type in which Megatron stores ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < UINT16_BELOW else np.int32)


def pair_file(prefix: str | Path, suffix: str) -> Path:
    """P.bin, P.idx or P.meta of a prefix, which may have dots in it."""
    return Path(f"{prefix}.{suffix}")


def read_facts(prefix: str | Path) -> dict[str, Any]:
    """What preprocessing wrote about a pair; empty where it wrote nothing (data from other tools)."""
    path = pair_file(prefix, "meta")
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; preprocess again, or remove it") from error


def check_pair(prefix: str | Path) -> int:
    """The number of tokens of a pair. Raises `UserError` unless both files are there, whole, and belong together."""
    index, tokens = pair_file(prefix, "idx"), pair_file(prefix, "bin")
    for path in (index, tokens):
        if not path.is_file():
            raise UserError(f"{prefix}: there is no {path}; prefixes here: {_prefixes(path.parent)}")
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
        magic, version, code, sequences, bounds = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
        if magic != MAGIC or version != 1 or code not in SIZES:
            raise UserError(f"{index} is not an index of Megatron's")
        size = HEADER.size + 12 * sequences + 8 * bounds
        if index.stat().st_size not in (size, size + sequences):  # one byte more each in multimodal data
            raise UserError(
                f"{index} has {index.stat().st_size} bytes and should have {size}; a copy was cut off?"
            )
        if not sequences:
            raise UserError(f"{index}: there is no document in it")
        stream.seek(HEADER.size + 4 * (sequences - 1))
        (last,) = struct.unpack("<i", stream.read(4))
        stream.seek(HEADER.size + 12 * sequences - 8)
        (offset,) = struct.unpack("<q", stream.read(8))
    end = offset + last * SIZES[code]
    if tokens.stat().st_size != end or not end:
        raise UserError(
            f"{tokens} has {tokens.stat().st_size} bytes and {index} describes {end}; not a pair, or a copy was cut off?"
        )
    return end // SIZES[code]


def _prefixes(folder: Path) -> str:
    """What could be named in a folder; a couple of pairs by its short name."""
    names = [str(p).removesuffix(".idx") for p in folder.glob("*.idx")]
    found = sorted(
        {re.sub(r"_packed_(input_ids|labels|attention_mask)_document$", "", name) for name in names}
    )
    return shorten_list(found, MAX_LISTED) or "none"


class PairWriter:
    """Writes one pair: `add` in order, then `commit`. As a context manager; left without a commit it leaves nothing behind."""

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.documents = self.tokens = 0
        self._lengths: list[np.ndarray] = []
        pair_file(prefix, "bin").parent.mkdir(parents=True, exist_ok=True)
        self._committed = False
        self._bin = self._claim()

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents one after the other: their ids, and the number of ids [documents] int32 of each."""
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.append(lengths)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    @property
    def bytes_written(self) -> int:
        """Size of the new .bin so far."""
        return self.tokens * self.dtype.itemsize

    def commit(self, facts: dict[str, Any]) -> None:
        """Puts the new pair, and `facts` as P.meta, in the place of an old one."""
        folder = pair_file(self.prefix, "bin").parent
        sync_file(self._bin)
        with self._temporary("idx").open("wb") as index:
            for piece in self._index():
                index.write(piece)
            sync_file(index)
        with self._temporary("meta").open("wb") as side:
            side.write((json.dumps(facts, indent=2) + "\n").encode())
            sync_file(side)
        pair_file(self.prefix, "idx").unlink(missing_ok=True)
        sync_path(folder)
        for suffix in ("bin", "meta"):
            self._temporary(suffix).replace(pair_file(self.prefix, suffix))
        sync_path(folder)
        self._temporary("idx").replace(pair_file(self.prefix, "idx"))
        self._committed = True
        sync_path(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for suffix in (
            () if self._committed else ("bin", "idx", "meta")
        ):  # after that these names may be another writer's
            self._temporary(suffix).unlink(missing_ok=True)
        self._bin.close()

    def _claim(self) -> BinaryIO:
        """The new .bin, locked for as long as it is open; what a killed run left is written over."""
        path = self._temporary("bin")
        while True:
            claimed = path.open("ab")
            try:
                fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                claimed.close()
                raise UserError(
                    f"{path}: another process is writing {self.prefix}; wait for it, or use another prefix"
                ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(claimed.fileno()), path.stat()):
                    claimed.truncate(0)
                    return claimed
            claimed.close()  # whoever had it has put it in place in between: it is no temporary file any more

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}.tmp")

    def _index(self) -> Iterator[bytes]:
        yield HEADER.pack(MAGIC, 1, CODES[self.dtype], self.documents, self.documents + 1)
        for lengths in self._lengths:
            yield lengths.astype("<i4").tobytes()
        before = 0
        for lengths in self._lengths:
            ends = before + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            yield (ends - lengths * self.dtype.itemsize).astype("<i8").tobytes()
            before = int(ends[-1]) if len(ends) else before
        for start in range(0, self.documents + 1, 1 << 20):
            yield np.arange(start, min(start + (1 << 20), self.documents + 1), dtype="<i8").tobytes()
