"""Products and attention of bf16 and fp16 numbers in fp32, for CPUs without instructions for these formats.

There torch multiplies them number by number: at 0.1 to 10 GFLOP/s a core, where fp32 has 50 to 80. The
operands are converted, multiplied in fp32 and the result is rounded: the sums are fp32's on both ways, so the
two differ by the order of summation.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.cpu_products import Linear, Products, all_ranks
from ascendspeed.distributed.device import Device

MIN_ROWS = 4
"""Least rows of a product in fp32: for fewer the conversion of the weight takes longer than it gains."""
FEW_ROWS = 256
"""Products of fewer rows than these convert smaller parts of the weight, which stay in a core's cache."""
PART_ELEMENTS = 1 << 19
"""Elements of a part of the weight that exists in fp32 at a time, for few rows: 2 MiB."""
LARGE_PART_ELEMENTS = 1 << 21


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k], weight [n, k] -> x weight^T [..., n]; without a gradient. All in one half-precision format.

    The sizes alone decide between fp32 and torch's own product.
    """
    outputs, inputs = weight.shape
    if x.numel() < max(1, MIN_ROWS * inputs):
        return F.linear(x, weight)
    out = x.new_empty(*x.shape[:-1], outputs)
    flat, wide = out.view(-1, outputs), x.reshape(-1, inputs).float()
    step = max(1, (PART_ELEMENTS if len(wide) < FEW_ROWS else LARGE_PART_ELEMENTS) // inputs)
    buffer = _buffer(weight, min(step, outputs))
    for start in range(0, outputs, step):
        part = weight[start : start + step]
        flat[:, start : start + step] = wide @ buffer[: len(part)].copy_(part).t()
    return out


def _buffer(weight: Tensor, rows: int) -> Tensor:
    """Memory for `rows` rows of a weight [n, k] in fp32, in the order in which the weight lies in memory."""
    inputs = weight.size(1)
    is_transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    return torch.empty(inputs, rows).t() if is_transposed else torch.empty(rows, inputs)


def saving(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Context in which autograd keeps the fp32 operands of attention, [b, heads, s, d], in `dtype`.

    Queries, keys and values came from it; the output is rounded, as by torch's own attention in `dtype`.
    """
    if torch.compiler.is_compiling():
        return nullcontext()

    def pack(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype == torch.float32 and tensor.dim() == 4 else tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == dtype else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def choose(products: Products, device: Device) -> tuple[Linear | None, str]:
    """Returns the product that replaces torch's (None: torch's own), and the text for the log.

    By the CPUs alone, not by a measurement, so that a repeated run chooses alike. Collective on a CPU.
    """
    if device.kind != "cpu" or products.choice == "torch":
        return None, "torch"
    if products.choice == "onednn":
        return None, "torch (oneDNN is for fp32 on a CPU)"
    if products.choice == "fp32":
        return linear, "in fp32"
    if all_ranks(has_instructions(products.dtype)):
        return None, "torch"
    return linear, f"in fp32 (without instructions for {products.dtype} on this CPU)"


def has_instructions(dtype: str) -> bool:
    """True if torch multiplies matrices in bf16 or fp16 by instructions of this CPU."""
    name = f"_is_mkldnn_{dtype}_supported"
    supported: Callable[[], bool] | None = getattr(torch.ops.mkldnn, name, None)
    # Without oneDNN or its private question nothing is known, and torch's own product stays.
    return supported is None or supported()
