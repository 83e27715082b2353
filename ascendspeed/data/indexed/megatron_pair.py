"""Reads and writes Megatron's indexed format: a pair of files P.bin and P.idx that is complete whenever it
can be opened.

P.bin holds the ids of all documents, concatenated. P.idx, little-endian: `MMIDIDX\\0\\0`, uint64 version 1,
uint8 type code, uint64 number of sequences n, uint64 n + 1, int32 lengths [n], int64 byte offsets [n], int64
document bounds [n + 1].

`PairWriter` writes temporary files beside the old ones and renames them at the end: the old .idx is deleted
first and the new one renamed last, and no reader opens a pair without its .idx. A writer that is killed
leaves the old pair, no pair, or the new one. A third file, P.meta, records how the data was made; training
checks the vocabulary by it. It is JSON, but its suffix is not .json, so that a folder of input may contain
it.

A reader believes nothing: `check_pair` compares all of P.idx with itself and with the size of P.bin, and
samples of both files with their hashes in P.meta.
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from ascendspeed.utils.atomic import open_locked, sync_file, sync_path
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.file_samples import hash_samples
from ascendspeed.utils.safe_io import parse_json
from ascendspeed.utils.text import shorten, shorten_list

MAGIC, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of one id for every integer type code that Megatron knows."""
MAX_LISTED = 10
"""Prefixes in an error."""
CHECKED_AT_ONCE = 1 << 20
"""Entries of an index that are compared at once."""
SAMPLES_FACTS = {suffix: f"{suffix}_samples_sha256" for suffix in ("bin", "idx")}
"""File -> key in P.meta of the hash of samples of it (`file_samples.hash_samples`)."""
ENCODING_FACT = "encoding_sha256"
"""Key of the hash of the tokenizer (`tokenization.fingerprint`) in P.meta."""
SUPERVISED_FACT = "learnt"
"""Key of the number of supervised tokens in P.meta of a masked pair; an old word that files on disk keep."""
FACT_TYPES: dict[str, type] = {
    "documents": int,
    "tokens": int,
    "max_token": int,
    "vocab_size": int,
    SUPERVISED_FACT: int,
    "digest": str,
    "chat_template": str,
    ENCODING_FACT: str,
    **dict.fromkeys(SAMPLES_FACTS.values(), str),
}
"""Types of those facts that training uses."""
UINT16_BELOW = 65500
"""Megatron's bound, not 65,536: the same vocabulary gives the same files."""


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns the type in which Megatron stores ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < UINT16_BELOW else np.int32)


def pair_file(prefix: str | Path, suffix: str) -> Path:
    """Returns the path of P.bin, P.idx or P.meta; the prefix may contain dots."""
    return Path(f"{prefix}.{suffix}")


def read_facts(prefix: str | Path) -> dict[str, Any]:
    """Returns P.meta, what preprocessing recorded about a pair; empty for data of other tools. Raises
    `UserError` if damaged."""
    path = pair_file(prefix, "meta")
    try:
        facts = parse_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; preprocess again, or remove it") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged: not a table; preprocess again, or remove it")
    for name, kind in FACT_TYPES.items():
        value = facts.get(name)
        if name in facts and (type(value) is not kind or (isinstance(value, int) and value < 0)):
            raise UserError(
                f"{path} is damaged: {name} is {shorten(value)}, not a {'count' if kind is int else 'text'}; "
                "preprocess again, or remove it"
            )
    return facts


def check_pair(prefix: str | Path) -> int:
    """Returns the number of tokens. Raises `UserError` unless both files exist, are complete, agree with
    themselves and belong together."""
    index = pair_file(prefix, "idx")
    tokens = pair_file(prefix, "bin")
    for path in (index, tokens):
        if not path.is_file():
            raise UserError(f"{prefix}: there is no {path}; prefixes here: {_prefixes(path.parent)}")
    try:
        end, item_size = _check_index(index)
        if tokens.stat().st_size != end:
            raise UserError(
                f"{tokens} has {tokens.stat().st_size} bytes and {index} describes {end}; not a pair, or a "
                "copy was cut off?"
            )
        _check_samples(prefix, read_facts(prefix))
    except OSError as error:
        raise UserError(f"{error.filename or prefix} cannot be read: {error.strerror}") from error
    return end // item_size


def _check_samples(prefix: str | Path, facts: dict[str, Any]) -> None:
    """Raises `UserError` for a file of the pair that is not the one that P.meta describes."""
    meta = pair_file(prefix, "meta")
    for suffix, name in SAMPLES_FACTS.items():
        path = pair_file(prefix, suffix)
        if name in facts and hash_samples(path) != facts[name]:
            raise UserError(
                f"{path} is not the file that {meta} describes; is a copy damaged or mixed? Copy the three "
                f"files again, or preprocess again; if it is meant, remove {meta.name}"
            )


def _check_index(index: Path) -> tuple[int, int]:
    """Returns the size of P.bin by P.idx and the size of one id, in bytes. Raises `UserError` if entries of
    P.idx contradict each other."""
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
    magic, version, code, sequences, bounds = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != 1 or code not in SIZES:
        raise UserError(f"{index} is not an index of Megatron's")
    actual_size = index.stat().st_size
    size = HEADER.size + 12 * sequences + 8 * bounds
    if actual_size not in (size, size + sequences):  # one byte more each in multimodal data
        raise UserError(f"{index} has {actual_size} bytes and should have {size}; a copy was cut off?")
    if not sequences:
        raise UserError(f"{index}: there is no document in it")
    lengths = np.memmap(index, "<i4", "r", HEADER.size, (sequences,))
    offsets = np.memmap(index, "<i8", "r", HEADER.size + 4 * sequences, (sequences,))
    end = _check_offsets(index, lengths, offsets, SIZES[code])
    if not end:
        raise UserError(f"{index}: there is no token in it")
    _check_bounds(index, np.memmap(index, "<i8", "r", HEADER.size + 12 * sequences, (bounds,)), sequences)
    return end, SIZES[code]


def _check_offsets(index: Path, lengths: np.ndarray, offsets: np.ndarray, item_size: int) -> int:
    """Returns the end of the last sequence in P.bin, in bytes. Raises `UserError` unless every sequence has a
    length of at least 0 and begins where the one before it ends."""
    end = 0
    for start in range(0, len(lengths), CHECKED_AT_ONCE):
        part = lengths[start : start + CHECKED_AT_ONCE].astype(np.int64)
        ends = end + np.cumsum(part) * item_size
        wrong = (part < 0) | (offsets[start : start + CHECKED_AT_ONCE] != ends - part * item_size)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise UserError(
                f"{index} is damaged: sequence {start + first} has {part[first]} tokens at byte "
                f"{offsets[start + first]}, and the one before it ends at byte "
                f"{ends[first] - part[first] * item_size}; copy it again, or preprocess again"
            )
        end = int(ends[-1])
    return end


def _check_bounds(index: Path, bounds: np.ndarray, sequences: int) -> None:
    """Raises `UserError` unless the document bounds ascend from 0 to the number of sequences."""
    last = 0
    valid = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == sequences
    for start in range(0, len(bounds) if valid else 0, CHECKED_AT_ONCE):
        part = bounds[start : start + CHECKED_AT_ONCE]
        valid = valid and part[0] >= last and bool((part[1:] >= part[:-1]).all())
        last = int(part[-1])
    if not valid:
        raise UserError(
            f"{index} is damaged: its document bounds do not ascend from 0 to its {sequences} sequences; "
            "copy it again, or preprocess again"
        )


def _prefixes(folder: Path) -> str:
    """Lists the prefixes that a folder offers; a masked pair by its short name."""
    names = set()
    for path in folder.glob("*.idx"):
        prefix = str(path).removesuffix(".idx")
        names.add(re.sub(r"_packed_(input_ids|labels|attention_mask)_document$", "", prefix))
    return shorten_list(sorted(names), MAX_LISTED) or "none"


class PairWriter:
    """Writes one pair: `add` in order, then `commit`. A context manager that without a commit removes all it
    wrote."""

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        """Raises `UserError` if another process is writing the pair."""
        self.prefix = prefix
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0
        self._lengths: list[np.ndarray] = []
        pair_file(prefix, "bin").parent.mkdir(parents=True, exist_ok=True)
        self._committed = False
        self._bin = self._claim()

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: their ids, concatenated, and the number of ids of each, [documents] int32."""
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.append(lengths)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    @property
    def bytes_written(self) -> int:
        """Size of the new .bin so far, in bytes."""
        return self.tokens * self.dtype.itemsize

    def commit(self, facts: dict[str, Any]) -> None:
        """Publishes the pair, and `facts` as P.meta, in place of an old one."""
        folder = pair_file(self.prefix, "bin").parent
        sync_file(self._bin)
        with self._temporary("idx").open("wb") as index:
            for block in self._index():
                index.write(block)
            sync_file(index)
        facts = facts | {
            name: hash_samples(self._temporary(suffix)) for suffix, name in SAMPLES_FACTS.items()
        }
        with self._temporary("meta").open("wb") as meta:
            meta.write((json.dumps(facts, indent=2) + "\n").encode())
            sync_file(meta)
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
        if not self._committed:  # after a commit these names may be another writer's
            for suffix in ("bin", "idx", "meta"):
                self._temporary(suffix).unlink(missing_ok=True)
        self._bin.close()

    def _claim(self) -> IO[bytes]:
        """Opens the new .bin and locks it while it is open; the file of a killed run is overwritten."""
        path = self._temporary("bin")
        claimed = open_locked(path)
        if claimed is None:
            raise UserError(
                f"{path}: another process is writing {self.prefix}; wait for it, or use another prefix"
            )
        claimed.truncate(0)
        return claimed

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}.tmp")

    def _index(self) -> Iterator[bytes]:
        """Yields the content of P.idx in blocks."""
        yield HEADER.pack(MAGIC, 1, CODES[self.dtype], self.documents, self.documents + 1)
        for lengths in self._lengths:
            yield lengths.astype("<i4").tobytes()
        offset = 0
        for lengths in self._lengths:
            ends = offset + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            yield (ends - lengths * self.dtype.itemsize).astype("<i8").tobytes()
            offset = int(ends[-1]) if len(ends) else offset
        for start in range(0, self.documents + 1, 1 << 20):
            yield np.arange(start, min(start + (1 << 20), self.documents + 1), dtype="<i8").tobytes()
