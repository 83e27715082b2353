"""`Packer`, the interface of packing strategies, and `Packing`, the rows that a packer makes of documents."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document
from ascendspeed.data.packing.rows import Sample


@dataclass(frozen=True)
class Packing:
    """Rows of document parts. Row r holds the parts bounds[r] : bounds[r + 1], in order, from position 0."""

    bounds: np.ndarray
    """[rows + 1] int64."""
    documents: np.ndarray
    """[parts] int64: index of the part's document in the `lengths` that were packed."""
    starts: np.ndarray
    """[parts] int64: first token of the part in its document."""
    stops: np.ndarray
    """[parts] int64: one after the last token of the part in its document."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """Tokens in all rows, without padding."""
        return int((self.stops - self.starts).sum())


def concatenate(packings: Sequence[Packing], counts: Sequence[int]) -> Packing:
    """Joins the rows of several sets of documents; `counts` is the number of documents in each set."""
    first_document = np.cumsum([0, *counts])
    first_part = np.cumsum([0, *(len(packing.documents) for packing in packings)])
    bounds = [np.zeros(1, np.int64)]
    documents = []
    for number, packing in enumerate(packings):
        bounds.append(packing.bounds[1:] + first_part[number])
        documents.append(packing.documents + first_document[number])
    return Packing(
        np.concatenate(bounds),
        np.concatenate(documents),
        np.concatenate([packing.starts for packing in packings]),
        np.concatenate([packing.stops for packing in packings]),
    )


class StreamPosition(NamedTuple):
    """Begin of a sample in a stream of documents."""

    row: int
    """Row of the stream, counted over all epochs."""
    offset: int
    """Token of the row's document."""


GetDocument = Callable[[int], tuple[int, Document]]
"""Row of a stream -> the first row at or after it that gives a document, and this document."""


class Packer(ABC):
    """A packing strategy, chosen by `--packing`: how documents share the rows of a batch.

    Indexed data are packed all at once by `pack`, as the lengths of all documents are known. Data that are
    tokenized in training are packed one row at a time by `pack_next`.
    """

    name: ClassVar[str]
    """Value of `--packing`."""
    uses_segment_length: ClassVar[bool] = False
    """True if `--max-segment-length` applies."""
    packs_streams: ClassVar[bool] = False
    """True if `pack_next` is implemented."""
    stream_note: ClassVar[str] = ""
    """Description for the log; part of the key of cached positions, so a change makes resumed runs tokenize
    again."""
    predicts_across_rows: ClassVar[bool] = False
    """If a document continues in the next row, the last position of this row predicts its next token."""
    splits_documents: ClassVar[bool] = False
    """The part of a document that does not fit continues in another row; otherwise it is dropped."""
    per_file: ClassVar[bool] = False
    """A row holds documents of one file only."""
    position_period: int | None = None
    """Position ids restart after this many positions, wherever documents end; None: with every document."""
    seed: int | None = None
    """Seed of the document order; None: the run's."""

    @classmethod
    def from_config(cls, data: DataConfig) -> Self:
        """Creates the packer for a run. Raises `UserError` for settings that do not go together."""
        return cls()

    @abstractmethod
    def pack(self, lengths: np.ndarray, row_length: int) -> Packing:
        """Packs documents of `lengths` [documents], all above 0, into rows of `row_length` tokens."""

    def pack_next(
        self, get_document: GetDocument, position: StreamPosition, row_length: int
    ) -> tuple[Sample, StreamPosition]:
        """Packs one row from `position` on; returns it and the position where the next row begins."""
        raise NotImplementedError

    def estimate_rows(self, documents: int, tokens: float, row_length: int) -> float:
        """Expected number of rows of a stream with so many documents and tokens."""
        return tokens / row_length
