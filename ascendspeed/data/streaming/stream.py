"""One stream of rows -> its samples, in order, from any place.

A stream is an endless row of documents, some of which are missing (rows that make none); a filler takes them up from a `Place` and
gives one sample and the place where the next one begins. The place of every `EVERY`th sample is kept in a file, so that a run that
goes on need not tokenize all over again what it has seen.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ascendspeed.data.document import Document
from ascendspeed.data.packing.packed_dataset import Sample, assemble_row
from ascendspeed.utils.atomic import open_atomic

SAVE_EVERY = 32
"""Samples of a stream between two places that are kept."""


class StreamPosition(NamedTuple):
    """Where a sample begins."""

    row: int
    """Of the stream, over all epochs."""
    offset: int
    """Token of its document."""


Get = Callable[[int], tuple[int, Document]]
"""Row of a stream -> the first row from there on that makes a document, and this."""
Filler = Callable[[Get, StreamPosition, int], tuple[Sample, StreamPosition]]
"""(documents, where to begin, positions of a sample) -> sample, where the next one begins."""


def cut_text(get: Get, place: StreamPosition, length: int) -> tuple[Sample, StreamPosition]:
    """Documents one after the other, cut wherever a sample ends; all is learnt. The next sample begins with the last label."""
    pieces, need, (row, offset) = [], length + 1, place
    while True:
        row, document = get(row)
        piece = document.tokens[offset : offset + need]
        pieces.append(piece)
        need -= len(piece)
        if not need:
            break
        row, offset = row + 1, 0
    tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
    sample = tokens[:-1], tokens[1:], torch.ones(length), torch.arange(length)
    return sample, StreamPosition(row, offset + len(pieces[-1]) - 1)


def next_fit(get: Get, place: StreamPosition, length: int) -> tuple[Sample, StreamPosition]:
    """As many documents, in order, as a sample has room for; none is longer than a sample."""
    held, room, row = [], length, place.row
    while room:
        found, document = get(row)
        if len(document.tokens) > room:
            break
        held.append(document)
        room -= len(document.tokens)
        row = found + 1
    return _row(held, length), StreamPosition(row, 0)


def one_each(get: Get, place: StreamPosition, length: int) -> tuple[Sample, StreamPosition]:
    """One document."""
    row, document = get(place.row)
    return _row([document], length), StreamPosition(row + 1, 0)


def _row(documents: list[Document], length: int) -> Sample:
    return assemble_row([(document, 0, len(document.tokens)) for document in documents], length)


class SamplePositions:
    """The places of samples 0, EVERY, 2 EVERY ... of a stream, in memory and in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._known = path, [StreamPosition(0, 0)]
        self._saved = 0
        self._read()

    def before(self, sample: int) -> tuple[int, StreamPosition]:
        """The last sample at or before `sample` whose place is known, and that."""
        which = min(sample // SAVE_EVERY, len(self._known) - 1)
        return which * SAVE_EVERY, self._known[which]

    def note(self, sample: int, place: StreamPosition) -> None:
        """Where a sample begins; samples come in order from one whose place is known."""
        if sample != len(self._known) * SAVE_EVERY:
            return
        self._known.append(place)
        if self._path and len(self._known) > self._saved:
            self._write(self._path)

    def _read(self) -> None:
        """What another process or run has found, where it is more; a file that is not whole is none."""
        if self._path and self._path.is_file():
            with contextlib.suppress(OSError, ValueError, EOFError):
                found = np.load(self._path, allow_pickle=False)
                if (
                    found.ndim == 2
                    and found.shape[1] == 2
                    and found.dtype == np.int64
                    and len(found) > len(self._known)
                ):
                    self._known = [StreamPosition(*row) for row in found.tolist()]
                    self._saved = len(self._known)

    def _write(self, path: Path) -> None:
        try:
            with open_atomic(path, shared=True) as file:
                np.save(file, np.array(self._known, np.int64), allow_pickle=False)
            self._saved = len(self._known)
        except OSError:  # a full disk: what is kept only spares work
            self._path = None


class SampleStream:
    """The samples of one stream."""

    def __init__(
        self,
        get: Callable[[int, int], tuple[int, Document]],
        fill: Filler,
        length: int,
        places: SamplePositions,
    ) -> None:
        """`get`: (row, first row that is still wanted) -> as `Get`."""
        self._get, self._fill, self._length, self._places = get, fill, length, places
        self._next, self._place = 0, StreamPosition(0, 0)

    def missing(self, number: int) -> int:
        """Samples that must be made before sample `number`."""
        known = self._places.before(number)[0]
        return number - (max(known, self._next) if self._next <= number else known)

    def sample(self, number: int, passed: Callable[[], None] = lambda: None) -> Sample:
        """Sample `number` >= 0; `passed` is called for each that is made on the way there."""
        known, place = self._places.before(number)
        if not known <= self._next <= number:
            self._next, self._place = known, place
        while self._next < number:
            self._take()
            passed()
        return self._take()

    def _take(self) -> Sample:
        first = self._place.row
        sample, self._place = self._fill(lambda row: self._get(row, first), self._place, self._length)
        self._next += 1
        self._places.note(self._next, self._place)
        return sample
