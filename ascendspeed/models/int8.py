"""Symmetric int8 numbers with one scale for each row: quantisation, and the product with an int8 weight."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX = 127
KERNEL_ROWS = 4
"""Most rows of a product that torch's int8 kernel computes: from 8 rows on it is slower than the product with
a dequantised weight."""
KERNEL_MULTIPLE = 32
"""torch's int8 kernel reads beyond the end of rows of other lengths."""


def quantize(values: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values [..., n] -> int8 [..., n], and scales [..., 1] in `dtype`, so that values ~ int8 x scale.

    Numbers are rounded by the scale as it is stored, so its rounding costs no accuracy. `largest` [..., 1]:
    the largest magnitudes, if values are a part of the rows. NaN and infinity make the scale NaN or infinite.
    """
    if largest is None:
        largest = values.abs().amax(-1, keepdim=True)
    scale = (largest.float() / MAX).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = (values.float() / scale.float()).round_().clamp_(-MAX, MAX)
    return rounded.to(torch.int8), scale


def dequantize(numbers: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., n], scales [..., 1] -> values [..., n] in the scales' type."""
    return numbers.to(scale.dtype) * scale


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    product: Callable[[Tensor, Tensor], Tensor],
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """x [..., k], weight int8 [n, k], scale [n, 1] -> x (weight x scale)^T [..., n].

    The device's own `kernel` comes first (`Kernels.int8_linear`). A few rows in bf16 on a CPU go to torch's
    int8 kernel, which reads half the bytes; others to `product` (x, weight) with the weight in the type of x.
    In fp32 torch's kernel is a scalar loop.
    """
    rows = x.reshape(-1, x.size(-1))
    if kernel is not None and rows.size(0):
        return kernel(rows, weight, scale[:, 0]).view(*x.shape[:-1], weight.size(0))
    if _fits_kernel(rows, weight):
        out = torch._weight_int8pack_mm(rows.contiguous(), weight, scale[:, 0])
        return out.view(*x.shape[:-1], weight.size(0))
    return product(x, weight.to(x.dtype)) * scale[:, 0]


def _fits_kernel(rows: Tensor, weight: Tensor) -> bool:
    return (
        rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and 0 < rows.size(0) <= KERNEL_ROWS
        and weight.size(1) % KERNEL_MULTIPLE == 0
    )
