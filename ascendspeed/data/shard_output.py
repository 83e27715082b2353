"""Encoded documents on their way from a shard to the output files, with the counts for the report and
P.meta."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.data.document import Document, EncodedRows, Fault, Truncation
from ascendspeed.data.indexed import masked_pair
from ascendspeed.data.indexed.masked_pair import MaskedPairWriter
from ascendspeed.data.indexed.megatron_pair import PairWriter
from ascendspeed.data.skipped_rows import FileLocation, SkippedRow, SkippedRows
from ascendspeed.utils.errors import UserError


@dataclass
class RowCounts:
    """Counts over rows of the input."""

    rows: int = 0
    bytes: int = 0
    """Size of the tokenized text in UTF-8."""
    truncated: Truncation = field(default_factory=Truncation)
    skipped: SkippedRows = field(default_factory=SkippedRows)

    def update(self, following: "RowCounts") -> None:
        """Adds the counts of the next rows."""
        self.rows += following.rows
        self.bytes += following.bytes
        self.truncated += following.truncated
        self.skipped.update(following.skipped)


class ShardDocuments:
    """Documents of one shard under one key: collected by `add`, then joined to arrays, which processes pass
    on cheaply."""

    def __init__(self, path: Path, dtype: np.dtype, masked: bool) -> None:
        self._path = path
        self._masked = masked
        self._documents: list[Document] = []
        self.counts = RowCounts()
        self.tokens = np.zeros(0, dtype)
        """Ids of all documents, concatenated, in the type of the .bin."""
        self.lengths = np.zeros(0, np.int32)
        """Number of ids of each document."""
        self.supervised = np.zeros(0, bool) if masked else None
        """[tokens] loss mask, for documents with masks."""

    def add(self, encoded: EncodedRows, locations: Sequence[int]) -> None:
        """Appends the results of rows at `locations`."""
        skipped = []
        for location, result in zip(locations, encoded.documents, strict=True):
            if isinstance(result, Fault):
                skipped.append(SkippedRow(result, FileLocation(self._path, location)))
            else:
                self._documents.append(result)
        self.counts.skipped.add(skipped)
        self.counts.rows += len(encoded.documents)
        self.counts.bytes += encoded.bytes
        self.counts.truncated += encoded.truncated

    def join(self) -> None:
        """Fills `tokens`, `lengths` and `supervised` from the documents."""
        documents = self._documents
        self._documents = []
        if not documents:
            return
        dtype = self.tokens.dtype
        self.tokens = np.concatenate([d.tokens for d in documents], dtype=dtype, casting="unsafe")
        self.lengths = np.array([len(part.tokens) for d in documents for part in d.parts()], np.int32)
        if self._masked:
            self.supervised = np.concatenate([d.loss_mask for d in documents])


class DatasetOutput:
    """Documents of all shards under one key: writes them and counts."""

    def __init__(
        self, writer: PairWriter | MaskedPairWriter, strict: bool = False, seq_length: int | None = None
    ) -> None:
        """`strict`: the first skipped row is an error; `seq_length`: length to which documents are
        truncated."""
        self.writer = writer
        self._strict = strict
        self._seq_length = seq_length
        self.counts = RowCounts()
        self._max_token = 0

    def add(self, shard: ShardDocuments) -> None:
        """Writes the documents of the next shard. Raises `UserError` for a skipped row if `strict`."""
        first = shard.counts.skipped.first
        if self._strict and first:
            raise UserError(f"--strict: {first.location}: {first.fault}; nothing was written")
        if isinstance(self.writer, MaskedPairWriter):
            assert shard.supervised is not None
            self.writer.add(shard.tokens, shard.lengths, shard.supervised)
        else:
            self.writer.add(shard.tokens, shard.lengths)
        self._max_token = max(self._max_token, int(shard.tokens.max(initial=0)))
        self.counts.update(shard.counts)

    def summary(self) -> str:
        """One log line: files, documents, tokens and skipped rows."""
        writer = self.writer
        size = f"{writer.documents:,} documents, {writer.tokens:,} tokens"
        if isinstance(writer, MaskedPairWriter) and writer.stem == masked_pair.PREFERENCE:
            size = f"{writer.documents // 2:,} preference pairs, {writer.tokens:,} tokens"
        written = f"{writer.prefix}.bin, .idx: {size}"
        if isinstance(writer, MaskedPairWriter):
            names = " and ".join(masked_pair.pair_prefix("", key) for key in writer.keys)
            written = f"{writer.prefix} ({names}): {size}, {writer.supervised:,} of them supervised"
            if self._seq_length and writer.stem != masked_pair.PREFERENCE:
                written += f", {self.counts.truncated.describe(self._seq_length)}"
        skipped = self.counts.skipped.summary() or "none"
        return f"{written}; from {self.counts.rows:,} rows, skipped: {skipped}"

    def facts(self) -> dict[str, Any]:
        """Counts for P.meta; like all of it, independent of time, place and the number of processes."""
        facts = {
            "documents": self.writer.documents,
            "tokens": self.writer.tokens,
            "bytes": self.counts.bytes,
            "rows": self.counts.rows,
            "skipped": dict(sorted(self.counts.skipped.counts.items())),
            "max_token": self._max_token,
        }
        if isinstance(self.writer, MaskedPairWriter):
            truncated = self.counts.truncated
            facts |= {
                "truncated": truncated.documents,
                "answers_lost": truncated.lost_answers,
                "answers_cut": truncated.cut_answers,
            }
        return facts
