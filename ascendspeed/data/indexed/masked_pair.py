"""Instruction data on disk: two pairs under the published names, of the same documents.

`P_packed_input_ids_document` holds the ids; `P_packed_labels_document` the same ids where they are to be learnt and -100 where
not, unshifted. Both metas carry the same digest, and the ids come last: a run that was killed leaves no two that open together.
What the published tool wrote has no metas and a third pair, the attention mask, which says nothing and is not read.
"""

import functools
import hashlib
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ascendspeed.data.document import Document, Supervision, count_supervised
from ascendspeed.data.indexed.megatron_pair import PairWriter, check_pair, pair_file, read_facts
from ascendspeed.utils.errors import UserError

KEYS = ("packed_input_ids", "packed_labels")
UNTRAINABLE = {KEYS[1]: "labels", "packed_attention_mask": "attention masks"}
IGNORED = -100
DTYPE = np.dtype(np.int32)
CHUNK = 1 << 20
"""Labels that are looked at together."""


def pair_prefix(prefix: str | Path, key: str) -> str:
    """Prefix of the pair that is kept under a key."""
    return f"{prefix}_{key}_document"


def find_pairs(prefix: str) -> tuple[str, str] | None:
    """(ids, labels) of the couple that `--data-path` means; None when it means something else.

    It may be named by `P`, as given to preprocessing, by `P_packed`, or by its ids. Raises `UserError` for the name of another pair
    of the couple, which is none to train on.
    """
    for key, what in UNTRAINABLE.items():
        if prefix.endswith(f"_{key}_document"):
            raise UserError(f"{prefix}: these are {what}; give {prefix.removesuffix(f'_{key}_document')}")
    for name in (prefix, prefix.removesuffix("_packed"), prefix.removesuffix(f"_{KEYS[0]}_document")):
        ids, labels = (pair_prefix(name, key) for key in KEYS)
        if pair_file(ids, "idx").is_file() and (name != prefix or not pair_file(prefix, "idx").is_file()):
            return ids, labels
    return None


class MaskedPair:
    """A couple that was opened: `Documents`."""

    def __init__(self, prefix: str, ids: str, labels: str) -> None:
        """Raises `UserError` unless both pairs are there, whole, and belong together."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # writing needs no torch

        self.prefix = prefix
        self.tokens = check_pair(ids)
        check_pair(labels)
        self._ids, self._labels = IndexedDataset(ids), IndexedDataset(labels)
        self.lengths = self._ids.sequence_lengths
        self.files = np.array([0, len(self.lengths)], np.int64)
        digests = {read_facts(one).get("digest") for one in (ids, labels)}
        if len(digests) > 1 or not np.array_equal(self.lengths, self._labels.sequence_lengths):
            raise UserError(
                f"{ids} and {labels} are not of the same documents; was a run killed? Preprocess again"
            )
        if read_facts(ids).get("learnt") == 0:
            raise UserError(
                f"{prefix}: no token of its {len(self.lengths):,} documents is to be learnt; preprocess again"
            )
        self._learnt = functools.lru_cache(1)(self._looked_through)

    def document(self, number: int) -> Document:
        """Raises `UserError` for a label that is neither its token nor -100."""
        tokens, labels = self._ids[number], self._labels[number]
        learnt = labels != IGNORED
        if (labels[learnt] != tokens[learnt]).any():
            raise UserError(
                f"{self.prefix}: document {number} has labels that are neither its tokens nor {IGNORED}; preprocess again"
            )
        return Document(tokens, learnt)

    def learnt(self, numbers: np.ndarray, length: int) -> Supervision:
        """As `Documents` says. All labels are looked at, once, in parts that memory does not notice."""
        found = self._learnt(length)
        return Supervision(found.tokens[numbers], found.lost[numbers], found.cut[numbers])

    def _looked_through(self, length: int) -> Supervision:
        labels = np.memmap(pair_file(self._labels.path_prefix, "bin"), self._labels.index.dtype, "r")
        ends = np.cumsum(self.lengths, dtype=np.int64)
        firsts = np.searchsorted(
            ends, np.arange(0, len(labels), CHUNK), side="right"
        )  # of each part: whole documents
        parts = []
        for first, last in pairwise(np.unique([0, *firsts, len(ends)]).tolist()):
            lengths = self.lengths[first:last]
            begin = int(ends[first]) - int(lengths[0])
            parts.append(count_supervised(labels[begin : int(ends[last - 1])] != IGNORED, lengths, length))
        return Supervision(
            *(
                np.concatenate(column)
                for column in zip(*((p.tokens, p.lost, p.cut) for p in parts), strict=True)
            )
        )

    def __len__(self) -> int:
        return len(self.lengths)


class MaskedPairWriter:
    """Writes a couple, as `PairWriter` writes a pair."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = f"{prefix}_packed"
        self.learnt = 0
        with ExitStack() as stack:
            self._ids, self._labels = (
                stack.enter_context(PairWriter(pair_prefix(prefix, key), DTYPE)) for key in KEYS
            )
            self._stack = stack.pop_all()  # both, or none
        self._digests = [
            hashlib.sha256() for _ in range(3)
        ]  # one each, so that they do not depend on how documents come

    def add(self, tokens: np.ndarray, lengths: np.ndarray, learnt: np.ndarray) -> None:
        """Documents one after the other: ids and whether each is to be learnt, both [tokens], and [documents] lengths int32."""
        tokens = tokens.astype(DTYPE)
        self._ids.add(tokens, lengths)
        self._labels.add(np.where(learnt, tokens, DTYPE.type(IGNORED)), lengths)
        self.learnt += int(learnt.sum())
        for digest, array in zip(
            self._digests, (tokens, lengths.astype(DTYPE), learnt.astype(bool)), strict=True
        ):
            digest.update(np.ascontiguousarray(array).data)

    @property
    def documents(self) -> int:
        """Written so far."""
        return self._ids.documents

    @property
    def tokens(self) -> int:
        """Written so far."""
        return self._ids.tokens

    @property
    def bytes_written(self) -> int:
        """Size of the new .bin files so far."""
        return self._ids.bytes_written + self._labels.bytes_written

    def commit(self, facts: dict[str, Any]) -> None:
        """Puts the new couple in the place of an old one."""
        digest = hashlib.sha256(b"".join(one.digest() for one in self._digests)).hexdigest()
        facts = facts | {"learnt": self.learnt, "digest": digest}
        self._labels.commit(facts)
        self._ids.commit(facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
