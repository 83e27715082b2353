"""Context parallel: which positions of a sequence a rank has, and all keys and values for its queries.

The sequence is cut into 2n chunks for n ranks; rank r has chunks r and 2n - 1 - r. Causal attention of an early chunk is cheap and
of a late one dear: so every rank has as much to do as every other.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


class SequenceShard(NamedTuple):
    """Rank `rank` of the `size` that share a sequence."""

    rank: int
    size: int

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's two chunks of a whole sequence, which lies along `dim`; all of it for a rank that is alone."""
        if self.size == 1:
            return whole
        chunks = whole.chunk(2 * self.size, dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def chunk_starts(self, length: int) -> list[int]:
        """Where this rank's chunks begin in a whole sequence of `length`."""
        chunk = length // (2 * self.size)
        return [0] if self.size == 1 else [self.rank * chunk, (2 * self.size - 1 - self.rank) * chunk]


WHOLE_SEQUENCE = SequenceShard(0, 1)


def gather_sequence(x: Tensor, group: Any) -> Tensor:
    """The whole sequence, in its own order, from every rank's share of it: [s / n, ...] -> [s, ...]; differentiable."""
    n = group.size()
    early, late = (
        gather_from_sequence_parallel_region(x, group=group).unflatten(0, (n, 2, len(x) // 2)).unbind(1)
    )
    return torch.cat((early.flatten(0, 1), late.flip(0).flatten(0, 1)))
