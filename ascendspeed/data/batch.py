"""`Batch`: the tensors of one micro-batch."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ascendspeed.data.packing.rows import PairSample, Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU; every tensor [b, s]."""

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64: the next token of each token; arbitrary where the loss mask is 0."""
    loss_mask: Tensor
    """float32: 1 where the label is in the loss."""
    position_ids: Tensor
    """int64; 0 at position 0, and at each document that must not attend to the documents before it."""
    conversations: Tensor | None = None
    """Conversation of every label of preference pairs, int64: 2 i for the chosen and 2 i + 1 for the rejected
    one of pair i of the micro-batch; arbitrary where the loss mask is 0."""
    pairs: int = 0
    """Preference pairs in the micro-batch."""
    reference: Tensor | None = None
    """[2 pairs] float32: log-probability of every answer under the reference weights, if it is known."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Returns the batch with `function` applied to every tensor [b, s]."""
        names = ("tokens", "labels", "loss_mask", "position_ids", "conversations")
        tensors = {name: getattr(self, name) for name in names}
        return dataclasses.replace(
            self, **{name: function(tensor) for name, tensor in tensors.items() if tensor is not None}
        )


def stack(samples: Sequence[Sample]) -> Batch:
    """Returns the micro-batch of these samples."""
    batch = Batch(*(torch.stack(column) for column in zip(*(sample[:4] for sample in samples), strict=True)))
    rows = [sample for sample in samples if isinstance(sample, PairSample)]
    if not rows:
        return batch
    first_pairs = np.cumsum([0, *(row.pairs for row in rows)])
    conversations = [
        row.conversations + 2 * int(first) for row, first in zip(rows, first_pairs, strict=False)
    ]
    references = [row.reference for row in rows if row.reference is not None]
    return dataclasses.replace(
        batch,
        conversations=torch.stack(conversations),
        pairs=int(first_pairs[-1]),
        reference=torch.cat(references) if references else None,
    )
