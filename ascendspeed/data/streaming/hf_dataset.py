"""A Hugging Face data set on disk, tokenized while it is trained on: no preprocessing, and any batch at any time.

The rows of a split are shuffled by seed + epoch and dealt to `STREAMS` streams, row r of the shuffled order to stream r mod K.
Each stream makes documents of its rows, in order and without end, and samples of these: text one document after the other, each
with an eos at its end, instruction data as many whole documents as a sample has room for. What is left at the end of an epoch goes
on into the next. Sample n of the split is sample n // K of stream n mod K: it depends on data, seed and settings alone, and who
needs it tokenizes one stream, not all of them.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document, EncodedRows, Fault, Truncation
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.handlers.registry import HANDLER_SETTINGS, HANDLERS, check_columns, unread_columns
from ascendspeed.data.packing.packed_dataset import Sample
from ascendspeed.data.readers import random_access
from ascendspeed.data.skipped_rows import SkippedRows
from ascendspeed.data.splits import describe_split
from ascendspeed.data.streaming.permutation import Permutation
from ascendspeed.data.streaming.positions import PositionCache
from ascendspeed.data.streaming.stream import (
    Filler,
    SamplePositions,
    SampleStream,
    cut_text,
    next_fit,
    one_each,
)
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

STREAMS = 64
MIN_ROWS_PER_STREAM = 64
"""A small set has fewer streams, so that each of them has this many rows."""
FLAGS = ("handler_name", "json_keys", *HANDLER_SETTINGS, "strict")
"""Of `DataConfig`, that mean something here only."""
PROBED_ROWS = 128
"""Rows from which the number of samples is estimated."""
SAMPLES_AHEAD = 4
"""Samples for which a stream tokenizes rows at once: tokenizers are faster with more, and begin sooner with fewer."""
MAX_ROWS_AT_ONCE = 64
"""Rows that are tokenized together, at most."""
SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt")
SPLITS = {"train": "train training", "validation": "validation valid val dev", "test": "test testing eval"}


def find_files(path: str) -> list[Path]:
    """The files that a path means: one, those of a pattern, or those of a folder; none where it holds no such data.

    Raises `UserError` for a folder with several splits.
    """
    folder = Path(path)
    if not folder.is_dir():
        named = (
            [folder]
            if folder.is_file()
            else sorted(folder.parent.glob(folder.name))
            if set(path) & set("*?[")
            else []
        )
        return _of_one_kind(named)
    if all((folder / name).is_file() for name in random_access.SAVED_FILES):
        return sorted(folder.glob("*.arrow"))
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(p for p in folder.iterdir() if (p / random_access.SAVED_FILES[0]).is_file())
        if len(parts) != 1:
            raise UserError(
                f"{path} holds several data sets; name one of them: {', '.join(map(str, parts)) or 'there is none'}"
            )
        return sorted(parts[0].glob("*.arrow"))
    found = _of_one_kind(sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."))
    splits = {_split(file.relative_to(folder)): file for file in reversed(found)}
    splits.pop("", None)
    if len(splits) > 1:
        example = next(iter(splits.values()))
        raise UserError(
            f"{path} holds several splits, {', '.join(sorted(splits))}: name the files of one, such as '{example}'"
        )
    return found


def _of_one_kind(files: Sequence[Path]) -> list[Path]:
    """Those of the first of `KINDS` that is there; what the hub puts beside data is none."""
    data = [file for file in files if not file.name.startswith("dataset_info")]
    return next((found for kind in SUFFIXES if (found := [file for file in data if file.suffix == kind])), [])


def _split(file: Path) -> str:
    """What the name of a file says it is for; empty: nothing."""
    words = set(re.split(r"[^a-z]+", str(file).lower()))
    return next((split for split, names in SPLITS.items() if words & set(names.split())), "")


class StreamedDataset:
    """Such a data set, opened."""

    def __init__(self, path: str, files: Sequence[Path], data: DataConfig) -> None:
        """Raises `UserError` for a tokenizer, handler or column that is not there, and damaged files."""
        self.prefix = path
        if not data.tokenizer_name_or_path:
            raise UserError(
                f"{path} is text: give --tokenizer-name-or-path, or make .bin/.idx of it by tools/preprocess_data.py"
            )
        name = data.handler_name or "GeneralPretrainHandler"
        ends = (
            name not in HANDLERS or "chat_template" not in HANDLERS[name].takes
        )  # in a chat format answers end by themselves
        if (
            data.json_keys != DataConfig.json_keys
            and name in HANDLERS
            and "json_keys" not in HANDLERS[name].takes
        ):
            raise UserError(f"--json-keys means nothing to {name}; leave it out")
        given = {setting: getattr(data, setting) for setting in HANDLER_SETTINGS}
        job = EncoderConfig(
            data.tokenizer_name_or_path,
            name,
            data.json_keys,
            append_eod=ends,
            seq_length=data.seq_length,
            **given,
        )
        self.maker = DocumentEncoder(job)
        self.learns_answers = self.maker.handler.learns_answers
        if len(self.maker.handler.keys) > 1:
            raise UserError(
                f"--json-keys {' '.join(data.json_keys)}: one column is streamed; blend data sets by --data-path"
            )
        cache = Path(data.data_cache_path) if data.data_cache_path else None
        self.table = random_access.open_table(path, files, cache and cache / "datasets")
        if not len(self.table):
            raise UserError(f"{path}: there is no row in it")
        check_columns(self.maker.handler, path, self.table.columns)
        for note in filter(
            None, (*self.maker.handler.notes, unread_columns(self.maker.handler, self.table.columns))
        ):
            logger.info(f"{path}: {note}")
        self.cache = cache or Path(path).absolute().parent / "index-cache"
        vocabulary = [
            p for p in sorted(self.maker.tokenizer.path.glob("*")) if p.suffix in (".json", ".model")
        ]
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in vocabulary]
        self.said = [random_access.fingerprint(files), digests, vars(job) | {"tokenizer_path": ""}]
        """What decides which documents the rows make."""

    def __len__(self) -> int:
        return len(self.table)

    def documents(self, numbers: np.ndarray) -> tuple[dict[int, Document | Fault], Truncation]:
        """Row -> what it makes, nothing for a blank line; and what was cut away."""
        batch = self.table.read(numbers, self.maker.handler.columns)
        made: EncodedRows = next(iter(self.maker.make(batch).values()))
        return dict(zip(batch.places, made.documents, strict=True)), made.truncated

    def source(self, chosen: range, name: str, data: DataConfig, seed: int) -> "StreamedSamples":
        """The samples of the rows `chosen`, those of the split `name`."""
        return StreamedSamples(self, chosen, name, data, seed)


class StreamedSamples:
    """The samples of one split: a `Source`."""

    estimated = True

    def __init__(
        self, data: StreamedDataset, chosen: range, name: str, config: DataConfig, seed: int
    ) -> None:
        if not len(chosen):
            raise UserError(f"{data.prefix}: {describe_split(config, name, 0, len(data), 'rows')}")
        self.prefix, self._data, self._chosen, self._seed, self._strict = (
            data.prefix,
            data,
            chosen,
            seed,
            config.strict,
        )
        self._length, self._count = (
            config.seq_length,
            max(1, min(STREAMS, len(chosen) // MIN_ROWS_PER_STREAM)),
        )
        self._fill, self._how = self._filler(config.packing)
        self._faults, self._reported = _Report(data, config.strict), 0
        self._truncated = Truncation()
        self._tokens = self._looked_at()
        self._cut = self._truncated
        samples = len(chosen) if self._fill is one_each else len(chosen) * self._tokens / self._length
        self.samples_per_epoch = max(1, round(samples))
        said = [1, data.said, chosen.start, chosen.stop, seed, self._length, self._count, self._how]
        self._restoring = PositionCache(
            data.cache, Path(data.prefix.rstrip("/")).name, name, json.dumps(said, default=str)
        )
        self._streams: dict[int, SampleStream] = {}

    @property
    def note(self) -> str:
        """One line for a person."""
        rows = f"{len(self._chosen):,} rows in {self._count} streams, {self._tokens:.0f} tokens each by {self._looked:,} of them"
        cut = f"; of these, {self._cut.said(self._length)}" if self._cut.documents else ""
        return f"{self.prefix}: tokenized while it is trained on: {rows}{cut}; {self._how}"

    def sample(self, number: int) -> Sample:
        """Sample `number` >= 0; numbers beyond an epoch go on into the next one."""
        place, which = divmod(number, self._count)
        if which not in self._streams:
            rows = _Rows(
                lambda rows: self._numbers(which, rows), self._read, self._at_once, self._epoch_of(which)
            )
            self._streams[which] = SampleStream(
                rows.get, self._fill, self._length, SamplePositions(self._restoring.file(which))
            )
        stream = self._streams[which]
        return stream.sample(place, self._restoring.passing(stream.missing(place), self._count))

    def _filler(self, packing: str | None) -> tuple[Filler, str]:
        if not self._data.learns_answers:
            return cut_text, "text is cut where a sample ends"
        if packing in (None, "first-fit"):
            return next_fit, "documents share a sample while there is room for the next"
        if packing == "none":
            return one_each, "one document in each sample"
        raise UserError(
            f"--packing {packing}: documents that are tokenized in training take first-fit or none"
        )

    @property
    def _at_once(self) -> int:
        return int(min(MAX_ROWS_AT_ONCE, max(1, SAMPLES_AHEAD * self._length // max(self._tokens, 1))))

    def _epoch_of(self, stream: int) -> int:
        """Rows of a stream in one epoch."""
        return -(-(len(self._chosen) - stream) // self._count)

    def _numbers(self, stream: int, rows: np.ndarray) -> np.ndarray:
        """The rows of the table that are `rows` of a stream, both [n] int64."""
        epochs, places = np.divmod(rows, self._epoch_of(stream))
        found = np.empty_like(rows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = Permutation(len(self._chosen), self._seed + int(epoch))
            found[here] = order(stream + places[here] * self._count)
        return self._chosen.start + found

    def _read(self, numbers: list[int]) -> dict[int, Document]:
        found, truncated = self._data.documents(np.array(numbers))
        self._truncated += truncated
        self._faults.add(found)
        return {number: one for number, one in found.items() if isinstance(one, Document)}

    def _looked_at(self) -> float:
        """Tokens of a row on average. Raises `UserError` when no row that was looked at makes a document."""
        numbers = np.unique(
            np.linspace(self._chosen.start, self._chosen.stop - 1, PROBED_ROWS).astype(np.int64)
        )
        self._looked = len(numbers)
        documents = self._read(numbers.tolist())
        if not documents:
            raise UserError(
                f"{self.prefix}: none of {len(numbers)} rows makes a document: {self._faults.said()}"
            )
        return sum(len(one.tokens) for one in documents.values()) / len(numbers)


class _Rows:
    """The documents of one stream's rows, a few at a time."""

    def __init__(
        self,
        numbers: Callable[[np.ndarray], np.ndarray],
        read: Callable[[list[int]], dict[int, Document]],
        at_once: int,
        epoch: int,
    ) -> None:
        """`epoch`: rows of the stream in one epoch."""
        self._numbers, self._read, self._at_once, self._epoch = numbers, read, at_once, epoch
        self._held: dict[int, Document | None] = {}

    def get(self, row: int, wanted: int) -> tuple[int, Document]:
        """The first document at or after `row`, and its row; those before `wanted` are let go."""
        for at in count(row):
            if at - row > self._epoch:
                raise UserError(
                    "a whole pass over the rows of a stream made no document; see what is said about them"
                )
            if at not in self._held:
                self._held = {n: one for n, one in self._held.items() if wanted <= n}
                numbers = self._numbers(np.arange(at, at + self._at_once)).tolist()
                found = self._read(list(dict.fromkeys(numbers)))
                self._held |= {at + i: found.get(number) for i, number in enumerate(numbers)}
            if (document := self._held[at]) is not None:
                return at, document
        raise AssertionError


class _Row:
    """A row that made no document."""

    def __init__(self, fault: Fault, where: str) -> None:
        self.fault, self.where = fault, where

    def __str__(self) -> str:
        return f"{self.where}: {self.fault.detail or self.fault.kind}"


class _Report:
    """Says which rows make no document, each once: the first of every kind, and the counts whenever these have doubled."""

    def __init__(self, data: StreamedDataset, strict: bool) -> None:
        self._data, self._strict, self._faults = data, strict, SkippedRows()
        self._known: set[int] = set()
        self._next = 1

    def add(self, found: dict[int, Document | Fault]) -> None:
        """What rows became."""
        bad = {
            number: one
            for number, one in found.items()
            if isinstance(one, Fault) and number not in self._known
        }
        self._known |= bad.keys()
        for number, fault in bad.items():
            row = _Row(fault, self._data.table.where(number))
            if self._strict:
                raise UserError(f"--strict: {row.where}: {fault}")
            before = len(self._faults.seen.get(fault.kind, []))
            self._faults.add([row])  # type: ignore[list-item]
            if len(self._faults.seen[fault.kind]) > before:
                logger.info(f"skipped, {fault.kind}: {row}")
        if (total := self._faults.counts.total()) >= self._next:
            self._next = 2 * total
            logger.info(f"{self._data.prefix}: rows skipped so far: {self.said()}")

    def said(self) -> str:
        """Counts by kind."""
        return self._faults.said() or "none"
