"""Passes of cross entropy over a vocabulary shard as Triton kernels: each reads the logits once.

They are the local part of the loss; the sums over tensor-parallel ranks stay with its caller.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ascendspeed.distributed.fused_kernels import CrossEntropyKernel

BLOCK = 8192
"""Logits per step of a program."""
WARPS = 8


@triton.jit
def statistics_kernel(
    logits, labels, largest, total, label_logit, row_stride, column_stride, size, BLOCK: tl.constexpr
):
    """Largest logit, sum of exp(logit - largest) and the label's logit of one row of `size` logits."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    top, summed = -float("inf"), 0.0
    for first in range(0, size, BLOCK):
        column = (first + tl.arange(0, BLOCK)).to(tl.int64)
        x = tl.load(start + column * column_stride, column < size, -float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)  # a block of -inf alone adds nothing
        summed = summed * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = new
    label = tl.load(labels + row)
    is_local = (label >= 0) & (label < size)
    own = tl.load(start + tl.where(is_local, label, 0) * column_stride).to(tl.float32)
    tl.store(largest + row, top)
    tl.store(total + row, summed)
    tl.store(label_logit + row, tl.where(is_local, own, 0.0))


@triton.jit
def gradient_kernel(
    logits,
    labels,
    largest,
    scale,
    at_label,
    share,
    row_stride,
    column_stride,
    size,
    share_columns,
    BLOCK: tl.constexpr,
):
    """Overwrites a block of a row by its gradient, see `CrossEntropyKernel`."""
    row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = column < size
    at = logits + row * row_stride + column * column_stride
    x = tl.load(at, inside, 0.0).to(tl.float32)
    value = tl.exp(x - tl.load(largest + row)) * tl.load(scale + row)
    value += tl.where(column == tl.load(labels + row), tl.load(at_label + row), 0.0)
    value -= tl.where(column < share_columns, tl.load(share + row), 0.0)
    tl.store(at, value.to(logits.dtype.element_ty), inside)


def statistics(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `CrossEntropyKernel`; a program per row."""
    largest, total, label_logit = (
        torch.empty(rows.size(0), dtype=torch.float32, device=rows.device) for _ in range(3)
    )
    statistics_kernel[(rows.size(0),)](
        *(rows, labels.contiguous(), largest, total, label_logit, *rows.stride(), rows.size(1)),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return largest, total, label_logit


def write_gradient(
    rows: Tensor,
    labels: Tensor,
    largest: Tensor,
    scale: Tensor,
    at_label: Tensor,
    share: Tensor | None,
    share_columns: int,
) -> None:
    """See `CrossEntropyKernel`; a program per block of a row."""
    if share is None:
        share, share_columns = at_label, 0
    vectors = (x.contiguous() for x in (labels, largest, scale, at_label, share))
    gradient_kernel[(rows.size(0), triton.cdiv(rows.size(1), BLOCK))](
        *(rows, *vectors, *rows.stride(), rows.size(1), share_columns),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


cross_entropy = CrossEntropyKernel(statistics, write_gradient)
