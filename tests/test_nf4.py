"""NF4 weights: against the nearest number by plain torch, and bitsandbytes where it is installed."""

import pytest
import torch

from ascendspeed.config.schema import NF4_BLOCK
from ascendspeed.models import nf4

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Rows of several magnitudes, one of them zero."""
    rows = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    rows *= 10.0 ** -torch.arange(48).remainder(4)[:, None]
    rows[3] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_number_is_the_nearest(dtype):
    weight = weights(dtype)
    packed, scales = nf4.quantize(weight)
    assert (packed.shape, scales.shape) == ((48, 128), (48, 4))
    values = torch.tensor(nf4.VALUES)
    blocks = weight.float().view(48, 4, 64)
    assert torch.equal(scales, blocks.abs().amax(-1))
    distance = (blocks[..., None] - scales[..., None, None] * values).abs()
    nearest = (scales[..., None] * values[distance.argmin(-1)]).view(48, 256)
    back = nf4.dequantize(packed, scales, dtype)
    assert torch.equal(back, nearest.to(dtype))
    assert torch.equal(nf4.quantize(back)[0], packed)  # stays when it is quantised again
    swapped = nf4.dequantize(packed >> 4 | packed << 4, scales, dtype)
    assert not torch.equal(swapped, back)  # control: the order within a byte


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_equals_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    weight = weights(dtype)
    expected, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    packed, scales = nf4.quantize(weight)
    assert torch.equal(packed.view(-1), expected.view(-1))
    assert torch.equal(scales.view(-1), state.absmax.view(-1))
    assert torch.equal(nf4.dequantize(packed, scales, dtype), functional.dequantize_4bit(expected, state))
