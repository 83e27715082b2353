"""Packers that keep documents in one row each (first fit, one per row) and the packer of plain text."""

import numpy as np
import torch

from ascendspeed.data.document import Document
from ascendspeed.data.packing.base import GetDocument, Packer, Packing, StreamPosition
from ascendspeed.data.packing.rows import Sample, assemble_pairs, assemble_row


class FirstFit(Packer):
    """Puts every document into the first row with enough free positions; a stream fills one row after the
    other (next fit)."""

    name = "first-fit"
    packs_streams = True
    stream_note = "documents share a sample while there is room for the next"

    def pack(self, lengths: np.ndarray, row_length: int) -> Packing:
        return first_fit(lengths, row_length)

    def pack_next(
        self, get_document: GetDocument, position: StreamPosition, row_length: int
    ) -> tuple[Sample, StreamPosition]:
        """Takes documents in order while the next one fits; none is longer than a row."""
        documents: list[Document] = []
        free = row_length
        next_row = position.row
        while free:
            row, document = get_document(next_row)
            if len(document.tokens) > free:
                break
            documents.append(document)
            free -= len(document.tokens)
            next_row = row + 1
        return _whole_documents(documents, row_length), StreamPosition(next_row, 0)


class OnePerRow(Packer):
    """Puts every document into a row of its own."""

    name = "none"
    packs_streams = True
    stream_note = "one document in each sample"

    def pack(self, lengths: np.ndarray, row_length: int) -> Packing:
        return one_per_row(lengths, row_length)

    def pack_next(
        self, get_document: GetDocument, position: StreamPosition, row_length: int
    ) -> tuple[Sample, StreamPosition]:
        row, document = get_document(position.row)
        return _whole_documents([document], row_length), StreamPosition(row + 1, 0)

    def estimate_rows(self, documents: int, tokens: float, row_length: int) -> float:
        return documents


class ContiguousText(Packer):
    """Splits the concatenated documents into samples without document boundaries: pre-training text in a
    stream.

    All tokens are supervised. The next sample begins with the last label of this one.
    """

    name = "text"
    packs_streams = True
    splits_documents = True
    stream_note = "text is cut where a sample ends"

    def pack(self, lengths: np.ndarray, row_length: int) -> Packing:
        return split_contiguous(lengths, row_length)

    def pack_next(
        self, get_document: GetDocument, position: StreamPosition, row_length: int
    ) -> tuple[Sample, StreamPosition]:
        parts = []
        missing = row_length + 1
        row, offset = position
        while True:
            row, document = get_document(row)
            part = document.tokens[offset : offset + missing]
            parts.append(part)
            missing -= len(part)
            if not missing:
                break
            row += 1
            offset = 0
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        sample = tokens[:-1], tokens[1:], torch.ones(row_length), torch.arange(row_length)
        return sample, StreamPosition(row, offset + len(parts[-1]) - 1)


def _whole_documents(documents: list[Document], row_length: int) -> Sample:
    if documents[0].rejected_start is not None:
        return assemble_pairs(documents, row_length)
    return assemble_row([(document, 0, len(document.tokens)) for document in documents], row_length)


def first_fit(lengths: np.ndarray, row_length: int) -> Packing:
    """Packs every document, in order, into the first row with enough free positions; longer ones are
    truncated to one row.

    `lengths`: [documents], above 0. Takes O(log rows) for a document: some seconds for a million.
    """
    return _pack_into(
        _first_fit_rows(np.minimum(lengths, row_length).tolist(), row_length), lengths, row_length
    )


def one_per_row(lengths: np.ndarray, row_length: int) -> Packing:
    """Packs every document into a row of its own; longer ones are truncated."""
    return _pack_into(np.arange(len(lengths)), lengths, row_length)


def _pack_into(rows: np.ndarray, lengths: np.ndarray, row_length: int) -> Packing:
    """Builds the packing in which document d is in the row `rows[d]`."""
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows) if len(rows) else np.zeros(0, np.int64)
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    stops = np.minimum(lengths, row_length).astype(np.int64)[order]
    return Packing(bounds, order, np.zeros_like(stops), stops)


def _first_fit_rows(lengths: list[int], row_length: int) -> np.ndarray:
    """Row of each document, [documents].

    A binary tree over the rows stores the largest number of free positions below every node; unused rows are
    empty.
    """
    leaves = 1 << (2 * sum(lengths) // row_length + 1).bit_length()  # all rows but one are at least half full
    free = [row_length] * (2 * leaves)
    rows = np.empty(len(lengths), np.int64)
    for document, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node += node  # the left child, unless the document does not fit there
            if free[node] < length:
                node += 1
        rows[document] = node - leaves
        largest = free[node] - length
        free[node] = largest
        while node > 1:
            sibling = free[node ^ 1]
            node >>= 1
            largest = largest if largest > sibling else sibling  # faster than max()
            if free[node] == largest:
                break
            free[node] = largest
    return rows


def split_contiguous(lengths: np.ndarray, row_length: int, segment: int | None = None) -> Packing:
    """Concatenates documents, splits them where a row ends, and splits their parts in a row after every
    `segment` tokens.

    `lengths`: [documents], above 0. A last row that is not full is dropped.
    """
    segment = segment or row_length
    ends = np.cumsum(lengths, dtype=np.int64)
    rows = int(ends[-1]) // row_length if len(ends) else 0
    begins = ends - lengths
    row_begins = np.arange(rows, dtype=np.int64) * row_length
    # Parts of one document in one row, then these parts in segments.
    part_begins = np.union1d(begins[begins < rows * row_length], row_begins)
    part_lengths = np.diff(part_begins, append=rows * row_length)
    counts = -(-part_lengths // segment)
    segment_of_part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(part_begins, counts) + segment_of_part * segment
    last = np.minimum(first + segment, np.repeat(part_begins + part_lengths, counts))
    documents = np.searchsorted(ends, first, side="right")
    bounds = np.append(np.searchsorted(first, row_begins), len(first))
    return Packing(bounds, documents, first - begins[documents], last - begins[documents])
