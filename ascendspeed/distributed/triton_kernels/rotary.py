"""Rotary embedding as a Triton kernel: all heads of a token in one pass, on the strides of packed q, k, v."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotate_kernel(
    x,
    out,
    cos,
    sin,
    batch,
    heads,
    half,
    x_position,
    x_row,
    x_head,
    table_position,
    table_row,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotates the halves of every head of a token: x [s, b, heads, 2 half] of any strides but the last.

    `x_position`, `x_row`, `x_head`, `table_position`, `table_row`: strides. `sign`: 1, or -1 for the inverse.
    """
    token = tl.program_id(0).to(tl.int64)
    position, row = token // batch, token % batch
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (i < half)
    entry = position * table_position + row * table_row + i
    c = tl.load(cos + entry, i < half, 0.0).to(tl.float32)
    s = tl.load(sin + entry, i < half, 0.0).to(tl.float32) * sign
    start = x + position * x_position + row * x_row + head * x_head + i
    first = tl.load(start, inside, 0.0).to(tl.float32)
    second = tl.load(start + half, inside, 0.0).to(tl.float32)
    to = out + (token * heads + head) * 2 * half + i
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), inside)
    tl.store(to + half, (second * c + first * s).to(out.dtype.element_ty), inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of every head, in fp32 with one rounding.

    x [s, b, heads, d]; cos, sin [s, 1 or b, 1, d], whose halves are equal.
    """
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return _Rotary.apply(x, cos, sin, 1.0)


class _Rotary(torch.autograd.Function):
    """Rotation whose backward pass is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        return _rotate(x, cos, sin, sign)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rotary.apply(gradient, *ctx.saved_tensors, -ctx.sign), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    length, batch, heads, d = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty(x.shape)
    table_row = cos.stride(1) if cos.size(1) > 1 else 0
    rotate_kernel[(length * batch,)](
        *(x, out, cos, sin, batch, heads, d // 2, *x.stride()[:3], cos.stride(0), table_row, sign),
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(d // 2),
    )
    return out
