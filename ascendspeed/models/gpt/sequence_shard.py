"""Positions of a sequence that a context-parallel rank holds.

The sequence is cut into 2n chunks for n ranks; rank r holds chunks r and 2n - 1 - r. Causal attention costs
little in early chunks and much in late ones, so this balances the work over the ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SequenceShard(NamedTuple):
    """The share of rank `rank` of `size` context-parallel ranks in a sequence."""

    rank: int
    size: int

    def take(self, full: Tensor, dim: int) -> Tensor:
        """Selects this rank's two chunks of a full sequence along `dim`; for a single rank, all of it."""
        if self.size == 1:
            return full
        chunks = full.chunk(2 * self.size, dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def chunk_starts(self, length: int) -> list[int]:
        """First position of each of this rank's chunks in a full sequence of `length`."""
        chunk = length // (2 * self.size)
        return [0] if self.size == 1 else [self.rank * chunk, (2 * self.size - 1 - self.rank) * chunk]


WHOLE_SEQUENCE = SequenceShard(0, 1)
