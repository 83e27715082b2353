"""SwiGLU as Triton kernels: the forward pass reads [gate; up] once, the backward pass computes silu again."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
"""Elements of one row per program."""


@triton.jit
def forward_kernel(x, out, x_stride, width, BLOCK: tl.constexpr):
    """silu(gate) · up of one block of a row: x [rows, 2 width] -> out [rows, width]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + width + column, inside, 0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), inside)


@triton.jit
def backward_kernel(x, gradient, out, x_stride, gradient_stride, width, BLOCK: tl.constexpr):
    """Gradient of one block of a row: x [rows, 2 width], gradient [rows, width] -> out [rows, 2 width]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + width + column, inside, 0.0).to(tl.float32)
    arriving = tl.load(gradient + row * gradient_stride + column, inside, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    of_gate = arriving * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_up = arriving * gate * sigmoid
    tl.store(out + row * 2 * width + column, of_gate.to(out.dtype.element_ty), inside)
    tl.store(out + row * 2 * width + width + column, of_up.to(out.dtype.element_ty), inside)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up, computed in fp32 and rounded once; x [..., 2f] holds [gate; up] -> [..., f]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps x alone; torch's operations keep silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        rows = _rows(x)
        width = rows.size(1) // 2
        out = x.new_empty(*x.shape[:-1], width)
        forward_kernel[_grid(rows, width)](rows, out, rows.stride(0), width, BLOCK=BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        rows, arriving = _rows(x), _rows(gradient)
        out = x.new_empty(x.shape)
        width = arriving.size(1)
        strides = rows.stride(0), arriving.stride(0)
        backward_kernel[_grid(rows, width)](rows, arriving, out, *strides, width, BLOCK=BLOCK)
        return out


def _rows(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n] with neighbouring columns; a copy only if its strides do not allow a view."""
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: Tensor, width: int) -> tuple[int, int]:
    return rows.size(0), triton.cdiv(width, BLOCK)
