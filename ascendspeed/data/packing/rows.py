"""Assembles one training sample from parts of documents.

A document of n tokens takes n positions of a row. The label of a position is the document's next token where
that is supervised; the last position of a document has no label. Position ids restart at 0 with every
document: attention finds the document boundaries by them. The unused end of a row is one more document
without labels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ascendspeed.data.document import Document

PlainSample = tuple[Tensor, Tensor, Tensor, Tensor]
"""tokens, labels, loss_mask, position_ids, each [s]; int64 except the float32 mask."""


class PairSample(NamedTuple):
    """A sample of preference pairs: a `Sample`, and the conversation of every position."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    conversations: Tensor
    """[s] int64: 2 i in the chosen and 2 i + 1 in the rejected conversation of pair i of the row; 0 in the
    unused end."""
    pairs: int
    """Pairs in the row."""
    reference: Tensor | None = None
    """[2 pairs] log-probability of every answer under the reference weights, fp32."""


Sample = PlainSample | PairSample


def assemble_pairs(pairs: Sequence[Document], row_length: int) -> PairSample:
    """Puts both conversations of every pair after one another into a sample of `row_length` positions."""
    parts = [part for pair in pairs for part in pair.parts()]
    lengths = [len(part.tokens) for part in parts]
    conversations = np.zeros(row_length, np.int64)
    conversations[: sum(lengths)] = np.repeat(np.arange(len(parts)), lengths)
    row = assemble_row([(part, 0, len(part.tokens)) for part in parts], row_length)
    return PairSample(*row, torch.from_numpy(conversations), len(pairs))


def assemble_row(
    parts: Iterable[tuple[Document, int, int]],
    row_length: int,
    predicts_across_rows: bool = False,
    position_period: int | None = None,
) -> PlainSample:
    """Concatenates parts (document, start, stop) into a sample of `row_length` positions; options as in
    `Packer`."""
    tokens = np.zeros(row_length, np.int64)
    labels = np.zeros(row_length, np.int64)
    loss_mask = np.zeros(row_length, np.int64)
    positions = np.empty(row_length, np.int64)
    begin = 0
    for document, start, stop in parts:
        end = begin + stop - start
        label_stop = stop + 1 if predicts_across_rows else stop
        next_tokens = document.tokens[start + 1 : label_stop]
        labelled = slice(begin, begin + len(next_tokens))
        tokens[begin:end] = document.tokens[start:stop]
        labels[labelled] = next_tokens
        if document.loss_mask is None:
            loss_mask[labelled] = 1
        else:
            loss_mask[labelled] = document.loss_mask[start + 1 : label_stop]
        positions[begin:end] = np.arange(stop - start)
        begin = end
    positions[begin:] = np.arange(row_length - begin)
    if position_period:
        positions = np.arange(row_length) % position_period
    return (
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(loss_mask).float(),
        torch.from_numpy(positions),
    )
