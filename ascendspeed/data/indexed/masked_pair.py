"""Instruction data on disk: two Megatron pairs of the same documents, ids and labels, under the published
names.

`P_packed_input_ids_document` holds the ids; `P_packed_labels_document` holds the same ids where a token is
supervised and -100 elsewhere, unshifted. Both .meta files have the same digest, and the ids are published
last, so a killed run leaves no two pairs that open together. Data of the published tool have no .meta and a
third pair, the attention mask, which is not read.
"""

import functools
import hashlib
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document, Supervision, count_supervised
from ascendspeed.data.indexed.megatron_pair import (
    SUPERVISED_FACT,
    PairWriter,
    check_pair,
    pair_file,
    read_facts,
)
from ascendspeed.data.token_dataset import SampleSource, TokenDataset, check_max_token
from ascendspeed.utils.errors import UserError

INSTRUCTION, PREFERENCE = "packed", "preference"
"""Beginnings of the keys of instruction data and of preference data."""


def keys_of(stem: str) -> tuple[str, str]:
    """Returns the keys of the ids and of the labels."""
    return f"{stem}_input_ids", f"{stem}_labels"


KEYS = keys_of(INSTRUCTION)
UNTRAINABLE = {
    KEYS[1]: "labels",
    keys_of(PREFERENCE)[1]: "labels",
    "packed_attention_mask": "attention masks",
}
"""Keys of pairs that only accompany the ids -> their content."""
IGNORED = -100
DTYPE = np.dtype(np.int32)
CHUNK = 1 << 20
"""Labels that are scanned at once."""


def pair_prefix(prefix: str | Path, key: str) -> str:
    """Returns the prefix of the pair that stores a key."""
    return f"{prefix}_{key}_document"


def find_pairs(prefix: str, stem: str = INSTRUCTION) -> tuple[str, str] | None:
    """Returns the prefixes (ids, labels) of the masked pair that `--data-path` names; None if it names
    something else.

    Its name is `P`, as given to preprocessing, `P_<stem>`, or the prefix of its ids. Raises `UserError` for
    the name of its labels or attention masks.
    """
    for key, content in UNTRAINABLE.items():
        if prefix.endswith(f"_{key}_document"):
            name = prefix.removesuffix(f"_{key}_document")
            raise UserError(f"{prefix}: these are {content}; give {name}")
    keys = keys_of(stem)
    for name in (prefix, prefix.removesuffix(f"_{stem}"), prefix.removesuffix(f"_{keys[0]}_document")):
        ids, labels = (pair_prefix(name, key) for key in keys)
        if pair_file(ids, "idx").is_file() and (name != prefix or not pair_file(prefix, "idx").is_file()):
            return ids, labels
    return None


class MaskedPair(TokenDataset):
    """Ids and labels of the same documents: `Documents` and a `TokenDataset`."""

    description = ".bin/.idx pairs with labels"
    flags = ("max_segment_length",)
    has_loss_mask = True

    def __init__(self, prefix: str, ids: str, labels: str) -> None:
        """Raises `UserError` unless both pairs exist, are complete and belong together."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # writing needs no torch

        self.prefix = prefix
        self.tokens = check_pair(ids)
        check_pair(labels)
        self._ids = IndexedDataset(ids)
        self._labels = IndexedDataset(labels)
        self.lengths = self._ids.sequence_lengths
        self.file_bounds = np.array([0, len(self.lengths)], np.int64)
        digests = {read_facts(pair).get("digest") for pair in (ids, labels)}
        if len(digests) > 1 or not np.array_equal(self.lengths, self._labels.sequence_lengths):
            raise UserError(
                f"{ids} and {labels} are not of the same documents; was a run killed? Preprocess again"
            )
        if read_facts(ids).get(SUPERVISED_FACT) == 0:
            raise UserError(
                f"{prefix}: no token of its {len(self.lengths):,} documents is supervised; preprocess again"
            )
        self._supervision = functools.lru_cache(1)(self._scan_labels)

    @classmethod
    def match(cls, path: str) -> bool:
        return find_pairs(path) is not None

    @classmethod
    def open(cls, path: str, data: DataConfig, vocab_size: int) -> Self:
        dataset = cls(path, *existing_pairs(path))
        check_max_token(path, cls.facts(path), dataset.tokens, vocab_size)
        return dataset

    @classmethod
    def files(cls, path: str) -> list[Path]:
        return [pair_file(prefix, suffix) for prefix in existing_pairs(path) for suffix in ("bin", "idx")]

    @classmethod
    def facts(cls, path: str) -> dict[str, Any]:
        return read_facts(existing_pairs(path)[0])

    def samples(self, split: str, data: DataConfig, seed: int) -> SampleSource:
        from ascendspeed.data.packing.algorithms import FirstFit  # writing needs no torch
        from ascendspeed.data.packing.packed_dataset import packed_samples

        return packed_samples(self, split, data, seed, FirstFit)

    def document(self, number: int) -> Document:
        """Returns a document. Raises `UserError` for a label that is neither its token nor -100."""
        tokens = self._ids[number]
        labels = self._labels[number]
        supervised = labels != IGNORED
        if (labels[supervised] != tokens[supervised]).any():
            raise UserError(
                f"{self.prefix}: document {number} has labels that are neither its tokens nor {IGNORED}; "
                "preprocess again"
            )
        return Document(tokens, supervised)

    def supervision(self, numbers: np.ndarray, length: int) -> Supervision:
        """Counts as in `Documents`. The first call scans all labels, in chunks."""
        total = self._supervision(length)
        return Supervision(total.tokens[numbers], total.lost_answers[numbers], total.cut_answers[numbers])

    def _scan_labels(self, length: int) -> Supervision:
        labels = np.memmap(pair_file(self._labels.path_prefix, "bin"), self._labels.index.dtype, "r")
        ends = np.cumsum(self.lengths, dtype=np.int64)
        # First documents of the chunks, which hold whole documents.
        firsts = np.searchsorted(ends, np.arange(0, len(labels), CHUNK), side="right")
        chunks = []
        for first, last in pairwise(np.unique([0, *firsts, len(ends)]).tolist()):
            lengths = self.lengths[first:last]
            begin = int(ends[first]) - int(lengths[0])
            mask = labels[begin : int(ends[last - 1])] != IGNORED
            chunks.append(count_supervised(mask, lengths, length))
        return Supervision(
            np.concatenate([chunk.tokens for chunk in chunks]),
            np.concatenate([chunk.lost_answers for chunk in chunks]),
            np.concatenate([chunk.cut_answers for chunk in chunks]),
        )

    def __len__(self) -> int:
        return len(self.lengths)


def existing_pairs(path: str, stem: str = INSTRUCTION) -> tuple[str, str]:
    """Returns the result of `find_pairs` for a path that it has found."""
    pairs = find_pairs(path, stem)
    assert pairs is not None  # after `match`
    return pairs


class MaskedPairWriter:
    """Writes a masked pair, with the interface of `PairWriter`."""

    def __init__(self, prefix: str | Path, stem: str = INSTRUCTION) -> None:
        self.prefix = f"{prefix}_{stem}"
        self.stem = stem
        self.keys = keys_of(stem)
        self.supervised = 0
        with ExitStack() as stack:  # opens both pairs or none
            self._ids, self._labels = (
                stack.enter_context(PairWriter(pair_prefix(prefix, key), DTYPE)) for key in self.keys
            )
            self._stack = stack.pop_all()
        # One digest for each array, so that the result does not depend on how documents are grouped.
        self._digests = [hashlib.sha256() for _ in range(3)]

    def add(self, tokens: np.ndarray, lengths: np.ndarray, supervised: np.ndarray) -> None:
        """Appends documents: ids and the mask of supervised tokens, both [tokens], and lengths [documents]
        int32."""
        tokens = tokens.astype(DTYPE)
        self._ids.add(tokens, lengths)
        self._labels.add(np.where(supervised, tokens, DTYPE.type(IGNORED)), lengths)
        self.supervised += int(supervised.sum())
        arrays = (tokens, lengths.astype(DTYPE), supervised.astype(bool))
        for digest, array in zip(self._digests, arrays, strict=True):
            digest.update(np.ascontiguousarray(array).data)

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return self._ids.documents

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._ids.tokens

    @property
    def bytes_written(self) -> int:
        """Size of the new .bin files so far, in bytes."""
        return self._ids.bytes_written + self._labels.bytes_written

    def commit(self, facts: dict[str, Any]) -> None:
        """Publishes the new masked pair in place of an old one."""
        digest = hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()
        facts = facts | {SUPERVISED_FACT: self.supervised, "digest": digest}
        self._labels.commit(facts)
        self._ids.commit(facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
