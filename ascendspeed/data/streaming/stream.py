"""Samples of one stream of documents, in order, from any position.

A stream is an endless sequence of rows, some of which give no document. A `Packer` takes documents from a
`StreamPosition` on and returns one sample and the position where the next one begins. The position of every
`SAVE_EVERY`th sample is stored in a file, so that a resumed run need not tokenize again what it has consumed.
The file is a .npy array, (row, offset) of every position, followed by the SHA-256 of the array.
"""

import hashlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ascendspeed.data.document import Document
from ascendspeed.data.packing.base import Packer, StreamPosition
from ascendspeed.data.packing.rows import Sample
from ascendspeed.utils.atomic import open_atomic

logger = logging.getLogger(__name__)

SAVE_EVERY = 32
"""Samples of a stream between two stored positions."""
DIGEST_BYTES = hashlib.sha256().digest_size


class SamplePositions:
    """Positions of the samples 0, SAVE_EVERY, 2 SAVE_EVERY ... of a stream, in memory and in a file."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None keeps the positions in memory only."""
        self._path = path
        self._positions = [StreamPosition(0, 0)]
        self._saved = 0
        self._load()

    def before(self, sample: int) -> tuple[int, StreamPosition]:
        """Returns the last sample at or before `sample` whose position is known, and the position."""
        index = min(sample // SAVE_EVERY, len(self._positions) - 1)
        return index * SAVE_EVERY, self._positions[index]

    def record(self, sample: int, position: StreamPosition) -> None:
        """Records where a sample begins; samples come in order from one whose position is known."""
        if sample != len(self._positions) * SAVE_EVERY:
            return
        self._positions.append(position)
        if self._path and len(self._positions) > self._saved:
            self._save(self._path)

    def _load(self) -> None:
        """Reads the positions that another process or run has stored; of a damaged file only a note is
        logged."""
        if not self._path or not self._path.is_file():
            return
        try:
            content = self._path.read_bytes()
        except OSError as error:
            logger.info(f"note: {self._path} cannot be read ({error.strerror}); a resumed run is slow")
            return
        stored = content[:-DIGEST_BYTES]
        if hashlib.sha256(stored).digest() != content[-DIGEST_BYTES:]:
            logger.info(f"note: {self._path} is damaged and not used: positions are computed again")
            return
        positions = np.load(io.BytesIO(stored), allow_pickle=False)
        self._positions = [StreamPosition(*row) for row in positions.tolist()]
        self._saved = len(self._positions)

    def _save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._positions, np.int64), allow_pickle=False)
        stored = buffer.getvalue()
        try:
            with open_atomic(path, shared=True) as file:
                file.write(stored + hashlib.sha256(stored).digest())
            self._saved = len(self._positions)
        except OSError:  # on a full disk: the file only saves work
            self._path = None


class SampleStream:
    """The samples of one stream."""

    def __init__(
        self,
        get_document: Callable[[int, int], tuple[int, Document]],
        packer: Packer,
        row_length: int,
        positions: SamplePositions,
    ) -> None:
        """`get_document`: (row, first row that is still needed) -> result of `GetDocument`."""
        self._get_document = get_document
        self._packer = packer
        self._row_length = row_length
        self._positions = positions
        self._next = 0
        self._position = StreamPosition(0, 0)

    def missing(self, number: int) -> int:
        """Returns the number of samples that must be packed before sample `number`."""
        known = self._positions.before(number)[0]
        return number - (max(known, self._next) if self._next <= number else known)

    def sample(self, number: int, on_replay: Callable[[], None] = lambda: None) -> Sample:
        """Returns sample `number` >= 0; calls `on_replay` for each sample that is packed on the way."""
        known, position = self._positions.before(number)
        if not known <= self._next <= number:
            self._next = known
            self._position = position
        while self._next < number:
            self._take()
            on_replay()
        return self._take()

    def _take(self) -> Sample:
        first = self._position.row
        sample, self._position = self._packer.pack_next(
            lambda row: self._get_document(row, first), self._position, self._row_length
        )
        self._next += 1
        self._positions.record(self._next, self._position)
        return sample
