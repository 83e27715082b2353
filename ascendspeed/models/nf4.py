"""NF4 weights: 4-bit numbers with one scale for every 64 inputs, as in QLoRA (arXiv 2305.14314, appendix E).

The numbers and the order of two of them in a byte are those of bitsandbytes; unlike it this runs on every
device.
"""

import torch
from torch import Tensor

from ascendspeed.config.schema import NF4_BLOCK

VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, scaled to [-1, 1]."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [n, k], k a multiple of 64 -> two numbers per byte, uint8 [n, k / 2], and scales [n, k / 64] in
    fp32."""
    blocks = weight.float().unflatten(-1, (-1, NF4_BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True)
    values = torch.tensor(VALUES, device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    scaled = blocks / torch.where(scales == 0, torch.ones_like(scales), scales)
    numbers = torch.bucketize(scaled, middles).to(torch.uint8).flatten(-2)
    return numbers[..., ::2] << 4 | numbers[..., 1::2], scales[..., 0]


def dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [n, k / 2], scales [n, k / 64] -> values [n, k] in `dtype`."""
    numbers = torch.stack((packed >> 4, packed & 15), -1).flatten(-2)
    values = torch.tensor(VALUES, device=packed.device)[numbers.int()]
    return (values.unflatten(-1, (-1, NF4_BLOCK)) * scales[..., None]).flatten(-2).to(dtype)
