"""Frozen weights of linears in 8 bits (int8, a scale per output) or 4 bits (NF4, a scale per 64 inputs)."""

import torch
from torch import Tensor

from ascendspeed.models import int8, nf4


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [n, k] with scales [n, 1], or NF4 [n, k / 2] with scales [n, k / 64] -> [n, k].

    NF4 becomes `dtype`; int8 has the type of its scales.
    """
    return nf4.dequantize(weight, scale, dtype) if is_nf4(weight) else int8.dequantize(weight, scale)


def is_nf4(weight: Tensor) -> bool:
    """Returns whether a quantized weight is in NF4."""
    return weight.dtype == torch.uint8
