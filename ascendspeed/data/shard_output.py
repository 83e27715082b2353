"""What shards make, on its way to the files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.data.document import Document, EncodedRows, Fault, Truncation
from ascendspeed.data.indexed import masked_pair
from ascendspeed.data.indexed.masked_pair import MaskedPairWriter
from ascendspeed.data.indexed.megatron_pair import PairWriter
from ascendspeed.data.skipped_rows import SkippedRow, SkippedRows
from ascendspeed.utils.errors import UserError


@dataclass
class ShardDocuments:
    """What one shard makes under one key."""

    tokens: np.ndarray
    """Ids of all documents, one after the other, in the type of the .bin."""
    lengths: np.ndarray
    """Ids of each document, int32."""
    learnt: np.ndarray | None = None
    """[tokens] bool, of documents with masks."""
    bytes: int = 0
    """Of the tokenized text, in UTF-8."""
    rows: int = 0
    truncated: Truncation = field(default_factory=Truncation)
    faults: SkippedRows = field(default_factory=SkippedRows)


class Gathered:
    """What the batches of one shard make under one key."""

    def __init__(self, path: Path, dtype: np.dtype, masked: bool) -> None:
        self._path, self._dtype, self._masked = path, dtype, masked
        self._documents: list[Document] = []
        self._result = ShardDocuments(
            np.zeros(0, dtype), np.zeros(0, np.int32), np.zeros(0, bool) if masked else None
        )

    def add(self, made: EncodedRows, places: Sequence[int]) -> None:
        """What rows at `places` became."""
        both = list(zip(places, made.documents, strict=True))
        self._result.faults.add(
            SkippedRow(self._path, place, one) for place, one in both if isinstance(one, Fault)
        )
        self._documents += [one for _, one in both if isinstance(one, Document)]
        self._result.rows += len(both)
        self._result.bytes += made.bytes
        self._result.truncated += made.truncated

    def result(self) -> ShardDocuments:
        """All of it."""
        found, documents = self._result, self._documents
        if documents:
            found.tokens = np.concatenate([d.tokens for d in documents], dtype=self._dtype, casting="unsafe")
            found.lengths = np.array([len(d.tokens) for d in documents], np.int32)
            if self._masked:
                found.learnt = np.concatenate([d.loss_mask for d in documents])  # type: ignore[misc]
        return found


@dataclass
class DatasetOutput:
    """What all shards make under one key."""

    writer: PairWriter | MaskedPairWriter
    strict: bool = False
    """The first row that makes no document is an error."""
    length: int | None = None
    """To which documents are cut."""
    bytes: int = 0
    rows: int = 0
    truncated: Truncation = field(default_factory=Truncation)
    highest: int = 0
    """Id."""
    faults: SkippedRows = field(default_factory=SkippedRows)

    def add(self, result: ShardDocuments) -> None:
        """The next shard's. Raises `UserError`."""
        if self.strict and result.faults.first:
            first = result.faults.first
            raise UserError(f"--strict: {first.where}: {first.fault}; nothing was written")
        if isinstance(self.writer, MaskedPairWriter):
            self.writer.add(result.tokens, result.lengths, result.learnt)  # type: ignore[arg-type]
        else:
            self.writer.add(result.tokens, result.lengths)
        self.bytes += result.bytes
        self.rows += result.rows
        self.truncated += result.truncated
        self.highest = max(self.highest, int(result.tokens.max(initial=0)))
        self.faults.update(result.faults)

    def said(self) -> str:
        """One line for a person."""
        writer = self.writer
        made = f"{writer.prefix}.bin, .idx: {writer.documents:,} documents, {writer.tokens:,} tokens"
        if isinstance(writer, MaskedPairWriter):
            names = " and ".join(f"{masked_pair.pair_prefix('', key)}" for key in masked_pair.KEYS)
            made = f"{writer.prefix} ({names}): {writer.documents:,} documents, {writer.tokens:,} tokens"
            made += f", {writer.learnt:,} of them to be learnt"
            made += f", {self.truncated.said(self.length)}" if self.length else ""
        return f"{made}; from {self.rows:,} rows, skipped: {self.faults.said() or 'none'}"

    def facts(self) -> dict[str, Any]:
        """Counts for P.meta; like all in it, they do not depend on when, where or by how many processes it was made."""
        truncated = self.truncated
        cut = {"truncated": truncated.documents, "answers_lost": truncated.lost, "answers_cut": truncated.cut}
        return {
            "documents": self.writer.documents,
            "tokens": self.writer.tokens,
            "bytes": self.bytes,
            "rows": self.rows,
            "skipped": dict(sorted(self.faults.counts.items())),
            "max_token": self.highest,
        } | (cut if isinstance(self.writer, MaskedPairWriter) else {})
