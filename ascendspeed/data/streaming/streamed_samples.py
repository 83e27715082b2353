"""Samples of a dataset that is tokenized in training: any batch at any time, without preprocessing.

The rows of a split are shuffled with seed + epoch and dealt to K streams, row r of the shuffled order to
stream r mod K. Each stream packs the documents of its rows in order, epoch after epoch: text is concatenated
and split, with an eos after each document; instruction data fill a sample with as many whole documents as
fit. The end of one epoch continues with the next. Sample n of the split is sample n // K of stream n mod K,
so it depends on data, seed and settings alone, and a rank tokenizes only the streams it needs.
"""

import json
import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document, Fault, Truncation
from ascendspeed.data.packing.algorithms import ContiguousText, FirstFit, OnePerRow
from ascendspeed.data.packing.registry import create_stream_packer
from ascendspeed.data.packing.rows import Sample
from ascendspeed.data.skipped_rows import SkippedRow, SkippedRows
from ascendspeed.data.splits import describe_split
from ascendspeed.data.streaming.permutation import Permutation
from ascendspeed.data.streaming.positions import PositionCache
from ascendspeed.data.streaming.stream import SamplePositions, SampleStream
from ascendspeed.utils.errors import UserError

if TYPE_CHECKING:
    from ascendspeed.data.streaming.hf_dataset import StreamedDataset

logger = logging.getLogger(__name__)

STREAMS = 64
MIN_ROWS_PER_STREAM = 64
"""A small dataset has fewer streams, so that each of them has this many rows."""
PROBED_ROWS = 128
"""Rows from which the number of samples is estimated."""
SAMPLES_AHEAD = 4
"""Samples for which a stream tokenizes rows at once: more rows are faster in total, fewer give the first
sample sooner."""
POSITIONS_VERSION = 2
"""Version of the files of positions, a part of the key of their folder."""
MAX_ROWS_AT_ONCE = 64
"""Upper bound of the rows that are tokenized together."""


class StreamedSamples:
    """Samples of one split: a `SampleSource`."""

    estimated = True

    def __init__(
        self, dataset: "StreamedDataset", rows: range, split: str, data: DataConfig, seed: int
    ) -> None:
        """`rows` are those of the split. Raises `UserError` if none of the probed rows gives a document."""
        if not len(rows):
            raise UserError(f"{dataset.prefix}: {describe_split(data, split, 0, len(dataset), 'rows')}")
        self.prefix = dataset.prefix
        self._dataset = dataset
        self._rows = rows
        self._seed = seed
        self._seq_length = data.seq_length
        self._stream_count = max(1, min(STREAMS, len(rows) // MIN_ROWS_PER_STREAM))
        default = OnePerRow if dataset.holds_pairs else FirstFit
        self._packer = create_stream_packer(data, default) if dataset.has_loss_mask else ContiguousText()
        self._report = _SkipReport(dataset, data.strict)
        self._truncated = Truncation()
        self._tokens_per_row = self._probe()
        self._probe_truncated = self._truncated
        tokens = len(rows) * self._tokens_per_row
        self.samples_per_epoch = max(
            1, round(self._packer.estimate_rows(len(rows), tokens, self._seq_length))
        )
        key = [
            POSITIONS_VERSION,
            dataset.cache_key,
            rows.start,
            rows.stop,
            seed,
            self._seq_length,
            self._stream_count,
        ]
        key.append(self._packer.stream_note)
        name = Path(dataset.prefix.rstrip("/")).name
        self._position_cache = PositionCache(dataset.cache, name, split, json.dumps(key, default=str))
        self._streams: dict[int, SampleStream] = {}

    @property
    def note(self) -> str:
        """One log line: rows, streams, tokens and packing."""
        streams = f"{len(self._rows):,} rows in {self._stream_count} streams"
        probe = f"about {self._tokens_per_row:.0f} tokens per row (estimated from {self._probed:,} rows)"
        truncated = ""
        if self._probe_truncated.documents:
            truncated = f"; of these, {self._probe_truncated.describe(self._seq_length)}"
        packing = self._packer.stream_note
        return f"{self.prefix}: tokenizing on the fly: {streams}, {probe}{truncated}; {packing}"

    def sample(self, number: int) -> Sample:
        """Returns sample `number` >= 0; numbers beyond an epoch continue in the next one."""
        index, which = divmod(number, self._stream_count)
        if which not in self._streams:
            documents = _StreamDocuments(
                lambda rows: self._table_rows(which, rows),
                self._read,
                self._rows_at_once,
                self._rows_per_epoch(which),
            )
            positions = SamplePositions(self._position_cache.file(which))
            self._streams[which] = SampleStream(documents.get, self._packer, self._seq_length, positions)
        stream = self._streams[which]
        on_replay = self._position_cache.replay_progress(stream.missing(index), self._stream_count)
        return stream.sample(index, on_replay)

    @property
    def _rows_at_once(self) -> int:
        rows = SAMPLES_AHEAD * self._seq_length // max(self._tokens_per_row, 1)
        return int(min(MAX_ROWS_AT_ONCE, max(1, rows)))

    def _rows_per_epoch(self, stream: int) -> int:
        """Number of a stream's rows in one epoch."""
        return -(-(len(self._rows) - stream) // self._stream_count)

    def _table_rows(self, stream: int, rows: np.ndarray) -> np.ndarray:
        """Maps rows of a stream to rows of the table, both [n] int64."""
        epochs, indices = np.divmod(rows, self._rows_per_epoch(stream))
        table_rows = np.empty_like(rows)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            order = Permutation(len(self._rows), self._seed + int(epoch))
            table_rows[selected] = order(stream + indices[selected] * self._stream_count)
        return self._rows.start + table_rows

    def _read(self, numbers: list[int]) -> dict[int, Document]:
        """Encodes rows of the table; returns the documents by row."""
        rows, truncated = self._dataset.documents(np.array(numbers))
        self._truncated += truncated
        self._report.add(rows)
        return {number: row for number, row in rows.items() if isinstance(row, Document)}

    def _probe(self) -> float:
        """Returns the mean number of tokens of a row. Raises `UserError` if no probed row gives a
        document."""
        numbers = np.unique(np.linspace(self._rows.start, self._rows.stop - 1, PROBED_ROWS).astype(np.int64))
        self._probed = len(numbers)
        documents = self._read(numbers.tolist())
        if not documents:
            raise UserError(
                f"{self.prefix}: none of {len(numbers)} rows makes a document: {self._report.summary()}"
            )
        return sum(len(document.tokens) for document in documents.values()) / len(numbers)


class _StreamDocuments:
    """Documents of one stream's rows, read a few rows at a time."""

    def __init__(
        self,
        table_rows: Callable[[np.ndarray], np.ndarray],
        read: Callable[[list[int]], dict[int, Document]],
        rows_at_once: int,
        rows_per_epoch: int,
    ) -> None:
        self._table_rows = table_rows
        self._read = read
        self._rows_at_once = rows_at_once
        self._rows_per_epoch = rows_per_epoch
        self._cache: dict[int, Document | None] = {}

    def get(self, first: int, needed: int) -> tuple[int, Document]:
        """Returns the first row at or after `first` that gives a document, and it; drops cached rows before
        `needed`.

        Raises `UserError` if a whole epoch gives no document.
        """
        for row in count(first):
            if row - first > self._rows_per_epoch:
                raise UserError(
                    "a whole pass over the rows of a stream made no document; see what is reported about them"
                )
            if row not in self._cache:
                self._fill(row, needed)
            document = self._cache[row]
            if document is not None:
                return row, document
        raise AssertionError

    def _fill(self, row: int, needed: int) -> None:
        self._cache = {number: document for number, document in self._cache.items() if needed <= number}
        numbers = self._table_rows(np.arange(row, row + self._rows_at_once)).tolist()
        documents = self._read(list(dict.fromkeys(numbers)))
        for offset, number in enumerate(numbers):
            self._cache[row + offset] = documents.get(number)


class _SkipReport:
    """Logs rows that give no document, each once: the first of every kind, and the counts whenever these have
    doubled."""

    def __init__(self, dataset: "StreamedDataset", strict: bool) -> None:
        self._dataset = dataset
        self._strict = strict
        self._skipped = SkippedRows()
        self._reported: set[int] = set()
        self._next_total = 1

    def add(self, rows: dict[int, Document | Fault]) -> None:
        """Takes the results of rows. Raises `UserError` for a fault if `strict`."""
        for number, fault in rows.items():
            if not isinstance(fault, Fault) or number in self._reported:
                continue
            self._reported.add(number)
            row = SkippedRow(fault, self._dataset.table.describe_location(number))
            if self._strict:
                raise UserError(f"--strict: {row.location}: {fault}")
            if self._skipped.add([row]):
                logger.info(f"skipped, {fault.kind}: {row}")
        total = self._skipped.counts.total()
        if total >= self._next_total:
            self._next_total = 2 * total
            logger.info(f"{self._dataset.prefix}: rows skipped so far: {self.summary()}")

    def summary(self) -> str:
        """Counts by kind."""
        return self._skipped.summary() or "none"
