"""Cross entropy of every token on vocabulary shards, read in pieces.

Megatron-core's own makes and keeps an fp32 softmax of all the logits, the largest tensor of a step. This one keeps the logits as
they are, and their gradient takes their place.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy(logits: Tensor, labels: Tensor, group: Any) -> Tensor:
    """-log softmax(logits)[label] of every token, fp32 [s, b].

    logits [s, b, V / TP] are this rank's part of the vocabulary, labels [s, b] count in the whole of it, `group` holds the
    tensor-parallel ranks. A label outside the vocabulary gives log sum exp(logits): mask it. The backward pass writes over the
    logits; a second one raises RuntimeError.
    """
    return _CrossEntropy.apply(logits, labels, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        rows = logits.flatten(0, 1)
        local = labels.flatten() - dist.get_rank(group) * rows.size(1)
        mine = (local >= 0) & (local < rows.size(1))
        local = torch.where(mine, local, 0)[:, None]
        label = torch.where(mine, rows.gather(1, local).squeeze(1).float(), 0.0)
        top, total = (
            torch.empty_like(label),
            torch.empty_like(label),
        )  # largest logit; sum of exp(logit - largest)
        for piece in _pieces(rows):
            x = rows[piece].float()
            top[piece] = x.amax(1)
            total[piece] = (x - top[piece, None]).exp_().sum(1)
        if dist.get_world_size(group) > 1:
            own = top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
            sums = torch.stack((total * (own - top).exp_(), label))
            dist.all_reduce(sums, group=group)
            total, label = sums
        ctx.save_for_backward(logits, local, mine, top, total)
        ctx.spent = False
        return (total.log() - (label - top)).view_as(labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.spent:
            raise RuntimeError(
                "a second backward pass through the loss: the first one wrote the gradient over the logits"
            )
        ctx.spent = True
        logits, local, mine, top, total = ctx.saved_tensors
        rows, gradient = logits.flatten(0, 1), gradient.flatten().float()
        scale, less = (gradient / total)[:, None], torch.where(mine, -gradient, 0.0)[:, None]
        for piece in _pieces(rows):
            x = rows[piece].float()  # itself in fp32
            x.sub_(top[piece, None]).exp_().mul_(scale[piece]).scatter_add_(1, local[piece], less[piece])
            if x.dtype != rows.dtype:
                rows[piece] = x
        return rows.view_as(logits), None, None


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that a CPU's cache holds (2 MiB in fp32); elsewhere fewer and larger ones."""
    size = max(1, (1 << 19 if rows.is_cpu else 1 << 26) // rows.size(1))
    return (slice(start, start + size) for start in range(0, rows.size(0), size))
