"""Context parallelism: the positions of a sequence that a rank holds, and their exchange for attention.

Either every rank gathers all keys and values (`gather_sequence`), or ranks exchange positions for heads
(`sequence_to_heads`, `heads_to_sequence`), as in DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509).

The sequence is cut into 2n chunks for n ranks; rank r holds chunks r and 2n - 1 - r. Causal attention costs
little in early chunks and much in late ones, so this balances the work over the ranks.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
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


def gather_sequence(x: Tensor, group: Any) -> Tensor:
    """Gathers the full sequence, in order, from all ranks: [s / n, ...] -> [s, ...]; differentiable."""
    gathered = gather_from_sequence_parallel_region(x, group=group)
    return _in_order(gathered.unflatten(0, (group.size(), len(x))))


def sequence_to_heads(x: Tensor, group: Any) -> Tensor:
    """Exchanges positions for heads: [s / n, b, heads, d] -> [s, b, heads / n, d], positions in order;
    differentiable."""
    n = group.size()
    by_rank = x.unflatten(2, (n, x.size(2) // n)).movedim(2, 0).contiguous()
    return _in_order(all_to_all(group, by_rank.flatten(0, 1)).unflatten(0, (n, len(x))))


def heads_to_sequence(x: Tensor, group: Any) -> Tensor:
    """Inverse of `sequence_to_heads`: [s, b, heads / n, d] -> [s / n, b, heads, d]; differentiable."""
    n = group.size()
    early, late = x.unflatten(0, (2, n, len(x) // (2 * n))).unbind()
    by_rank = torch.stack((early, late.flip(0)), 1)  # [rank][early, late chunk]
    exchanged = all_to_all(group, by_rank.flatten(0, 2)).unflatten(0, (n, len(x) // n))
    return exchanged.movedim(0, 2).flatten(2, 3)


def _in_order(shares: Tensor) -> Tensor:
    """Joins the shares of all ranks [n, s / n, ...] to the full sequence [s, ...]."""
    early, late = shares.unflatten(1, (2, shares.size(1) // 2)).unbind(1)
    return torch.cat((early.flatten(0, 1), late.flip(0).flatten(0, 1)))
