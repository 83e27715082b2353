"""How documents share the rows of a batch: pure functions (lengths of documents, length of a row) -> `Packing`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Rows of pieces of documents. Row r has the pieces bounds[r] : bounds[r + 1], one after the other from its beginning."""

    bounds: np.ndarray
    """[rows + 1] int64."""
    documents: np.ndarray
    """[pieces] int64: which document, by its place among the lengths that were given."""
    starts: np.ndarray
    """[pieces] int64: its first token here."""
    stops: np.ndarray
    """[pieces] int64: one after its last token here."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """In all rows; the rest is filling."""
        return int((self.stops - self.starts).sum())


def concatenate(packings: Sequence[Packing], counts: Sequence[int]) -> Packing:
    """The rows of several sets of documents; `counts`: how many documents each set has."""
    first = np.cumsum([0, *counts])
    pieces = np.cumsum([0, *(len(one.documents) for one in packings)])
    bounds = [one.bounds[1:] + before for one, before in zip(packings, pieces[:-1], strict=True)]
    documents = [one.documents + before for one, before in zip(packings, first[:-1], strict=True)]
    starts = [one.starts for one in packings]
    stops = [one.stops for one in packings]
    return Packing(
        np.concatenate([[0], *bounds]),
        np.concatenate(documents),
        np.concatenate(starts),
        np.concatenate(stops),
    )


@dataclass(frozen=True)
class Packer:
    """A way to pack."""

    pack: Callable[[np.ndarray, int], Packing]
    """(lengths [documents], all above 0; tokens of a row) -> rows."""
    goes_on: bool = False
    """Whether the label of a piece's last position is the document's next token, where it has one; else a piece ends as a document
    does."""
    keeps: bool = False
    """Whether what does not fit in a row goes on in another one; else it is lost."""
    segment: int | None = None
    """Positions after which position ids begin anew, wherever documents end; None: with every piece."""
    seed: int | None = None
    """Of the order of the documents; None: the run's."""
    apart: bool = False
    """Whether rows hold documents of one file only."""


def first_fit(lengths: np.ndarray, row: int) -> Packing:
    """Every document, in order, into the first row that has room for it; longer ones are cut to one row.

    `lengths`: [documents], above 0; `row`: tokens of a row. Log(rows) steps for a document: some seconds for a million.
    """
    return _rows_of(lengths, row, _first_fits(np.minimum(lengths, row).tolist(), row))


def one_each(lengths: np.ndarray, row: int) -> Packing:
    """Every document in a row of its own; longer ones are cut."""
    return _rows_of(lengths, row, np.arange(len(lengths)))


PACKERS: dict[str, Packer] = {"first-fit": Packer(first_fit), "none": Packer(one_each)}
"""By the name of `--packing`."""


def _rows_of(lengths: np.ndarray, row: int, chosen: np.ndarray) -> Packing:
    """`chosen` [documents]: the row of each document."""
    order = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen) if len(chosen) else np.zeros(0, np.int64)
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    stops = np.minimum(lengths, row).astype(np.int64)[order]
    return Packing(bounds, order, np.zeros_like(stops), stops)


def _first_fits(lengths: list[int], row: int) -> np.ndarray:
    """The row of each document. A tree over the rows knows the most room below every node; rows nobody needed are empty ones."""
    leaves = 1 << (2 * sum(lengths) // row + 1).bit_length()  # all rows but one are at least half full
    room = [row] * (2 * leaves)
    chosen = np.empty(len(lengths), np.int64)
    for document, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node += node  # the left child, unless it has no room
            if room[node] < length:
                node += 1
        chosen[document] = node - leaves
        left = room[node] - length
        room[node] = left
        while node > 1:
            other = room[node ^ 1]
            node >>= 1
            most = left if left > other else other
            if room[node] == most:
                break
            room[node] = left = most
    return chosen
