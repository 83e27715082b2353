"""Context parallelism: exchange of the positions that ranks hold (`SequenceShard`) for attention.

Either every rank gathers all keys and values (`gather_sequence`), or ranks exchange positions for heads
(`sequence_to_heads`, `heads_to_sequence`), as in DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509).
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor


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
