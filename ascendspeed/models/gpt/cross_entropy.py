"""Cross entropy of every token on vocabulary shards, computed in slices of rows.

Megatron-core's version keeps an fp32 softmax of all logits, the largest tensor of a step. This one keeps the
logits as they are and overwrites them with their gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ascendspeed.distributed.fused_kernels import CrossEntropyKernel

CPU_SLICE_ELEMENTS = 1 << 19
"""Logits of a slice, which is 2 MiB in fp32: it fits into the cache of a CPU core."""
DEVICE_SLICE_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class LossTerms:
    """Terms of the loss beyond cross entropy. They change the gradient only: what is reported stays
    comparable."""

    label_smoothing: float = 0.0
    """Weight e of the mean of -log softmax over the vocabulary; the label has 1 - e."""
    z_coeff: float = 0.0
    """Coefficient of log² Σ exp(logits)."""
    vocab_size: int = 0
    """Rows of the vocabulary without padding."""


PLAIN = LossTerms()


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: Any,
    terms: LossTerms = PLAIN,
    kernel: CrossEntropyKernel | None = None,
) -> Tensor:
    """-log softmax(logits)[label] of every token, fp32 [s, b].

    logits [s, b, V / TP] are this rank's part of the vocabulary, labels [s, b] index the whole vocabulary,
    `group` holds the tensor-parallel ranks. A label outside the vocabulary gives log sum exp(logits); mask
    it. The backward pass, which adds the gradients of `terms`, overwrites the logits; a second one raises
    RuntimeError. `kernel`: the device's passes over the logits; None: torch's, in slices of rows.
    """
    return _CrossEntropy.apply(logits, labels, group, terms, kernel or TORCH)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: Any, terms: LossTerms, kernel: CrossEntropyKernel
    ) -> Tensor:
        rows = logits.flatten(0, 1)
        local = labels.flatten() - dist.get_rank(group) * rows.size(1)
        largest, total, label_logit = kernel.statistics(rows, local)
        if dist.get_world_size(group) > 1:
            local_largest = largest.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            sums = torch.stack((total * (local_largest - largest).exp_(), label_logit))
            dist.all_reduce(sums, group=group)
            total, label_logit = sums
        ctx.save_for_backward(logits, local, largest, total)
        ctx.spent, ctx.terms, ctx.kernel = False, terms, kernel
        ctx.own_vocabulary = terms.vocab_size - dist.get_rank(group) * rows.size(1)
        return (total.log() - (label_logit - largest)).view_as(labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.spent:
            raise RuntimeError(
                "a second backward pass through the loss: the first one wrote the gradient over the logits"
            )
        ctx.spent = True
        logits, local, largest, total = ctx.saved_tensors
        rows, gradient = logits.flatten(0, 1), gradient.flatten().float()
        terms: LossTerms = ctx.terms
        of_sum = gradient * (1 + 2 * terms.z_coeff * (largest + total.log())) if terms.z_coeff else gradient
        share = gradient * (terms.label_smoothing / terms.vocab_size) if terms.label_smoothing else None
        at_label = -gradient * (1 - terms.label_smoothing)
        ctx.kernel.write_gradient(
            rows, local, largest, of_sum / total, at_label, share, max(0, ctx.own_vocabulary)
        )
        return rows.view_as(logits), None, None, None, None


def _statistics(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    is_local = (labels >= 0) & (labels < rows.size(1))
    index = torch.where(is_local, labels, 0)[:, None]
    label_logit = torch.where(is_local, rows.gather(1, index).squeeze(1).float(), 0.0)
    largest = torch.empty_like(label_logit)
    total = torch.empty_like(label_logit)
    for part in _row_slices(rows):
        x = rows[part].float()
        largest[part] = x.amax(1)
        total[part] = (x - largest[part, None]).exp_().sum(1)
    return largest, total, label_logit


def _write_gradient(
    rows: Tensor,
    labels: Tensor,
    largest: Tensor,
    scale: Tensor,
    at_label: Tensor,
    share: Tensor | None,
    share_columns: int,
) -> None:
    is_local = (labels >= 0) & (labels < rows.size(1))
    index = torch.where(is_local, labels, 0)[:, None]
    added = torch.where(is_local, at_label, 0.0)[:, None]
    for part in _row_slices(rows):
        x = rows[part].float()  # no copy if the logits are fp32
        x.sub_(largest[part, None]).exp_().mul_(scale[part, None]).scatter_add_(1, index[part], added[part])
        if share is not None:
            x[:, :share_columns].sub_(share[part, None])
        if x.dtype != rows.dtype:
            rows[part] = x


TORCH = CrossEntropyKernel(_statistics, _write_gradient)


def _row_slices(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows [tokens, V / TP] of limited size."""
    elements = CPU_SLICE_ELEMENTS if rows.is_cpu else DEVICE_SLICE_ELEMENTS
    size = max(1, elements // rows.size(1))
    return (slice(start, start + size) for start in range(0, rows.size(0), size))
