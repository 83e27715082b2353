"""Keys or values of a KV cache in int8, with a scale for each token and head."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ascendspeed.models import int8


class Int8Tensor:
    """Takes the place of a tensor [..., d] in a KV cache: what is written is quantised over d, what is read
    is dequantised. Indices leave d alone."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """`dtype`: type of the scales and of what is read."""
        self.numbers = torch.zeros(shape, dtype=torch.int8, device=device)
        self.scales = torch.zeros(*shape[:-1], 1, dtype=dtype, device=device)

    def __setitem__(self, index: Any, values: Tensor) -> None:
        self.numbers[index], self.scales[index] = int8.quantize(values, self.scales.dtype)

    def __getitem__(self, index: Any) -> Tensor:
        return int8.dequantize(self.numbers[index], self.scales[index])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Returns the dequantised slices of a dimension."""
        return int8.dequantize(self.numbers.index_select(dim, index), self.scales.index_select(dim, index))

    def size(self, dim: int) -> int:
        """Size of a dimension."""
        return self.numbers.size(dim)


CacheTensor: TypeAlias = Tensor | Int8Tensor


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_int8: bool) -> CacheTensor:
    """Returns zeros, as masked keys are still multiplied by 0 and must not be NaN."""
    if is_int8:
        return Int8Tensor(shape, dtype, device)
    return torch.zeros(shape, dtype=dtype, device=device)


def stored_tensors(cached: CacheTensor) -> tuple[Tensor, ...]:
    """The tensors that hold the cache, to copy parts of it unchanged."""
    return (cached.numbers, cached.scales) if isinstance(cached, Int8Tensor) else (cached,)


def bytes_per_head(head_dim: int, dtype: torch.dtype, is_int8: bool) -> int:
    """Bytes of a key or a value of one head."""
    return head_dim + dtype.itemsize if is_int8 else head_dim * dtype.itemsize
