"""The small operations that fused kernels exist for: plain torch, or the device's own where a flag asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.device import Device, SequenceBounds, fused_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467); x [..., h], weight [h]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of every head (arXiv 2104.09864, Llama's layout): x [s, b, heads, d]; cos, sin [s, 1 or b, 1, d]."""
    return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202); x [..., 2f] holds [gate; up] -> [..., f]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """gelu(gate) · up (arXiv 2002.05202), gelu by its tanh approximation; x [..., 2f] holds [gate; up] -> [..., f]."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


class _Rotary(torch.autograd.Function):
    """Turned back by the same turn: autograd's own way back is twice as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotary.apply(gradient, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    sin_first, sin_second = sin.chunk(2, -1)
    turned = x * cos
    left, right = turned.chunk(2, -1)
    left.addcmul_(second, sin_first, value=-1)
    right.addcmul_(first, sin_second)
    return turned


@dataclass(frozen=True)
class Kernels:
    """The operations in use, and where each comes from."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor] = rotary
    swiglu: Callable[[Tensor], Tensor] = swiglu
    geglu: Callable[[Tensor], Tensor] = geglu
    varlen: Callable[[Tensor, Tensor, Tensor, SequenceBounds], Tensor] | None = None
    """Causal attention within each of many sequences; None: torch's SDPA, one after the other."""
    sources: tuple[tuple[str, str], ...] = (("rms_norm", "torch"), ("rotary", "torch"), ("swiglu", "torch"))

    def __str__(self) -> str:
        return ", ".join(f"{operation}: {source}" for operation, source in self.sources)


def select_kernels(device: Device, **wanted: bool) -> Kernels:
    """`choose(device, rms_norm=True, ...)`: the device's fused kernel for each that is wanted and there, torch for the others."""
    found = {name: fused_kernel(device, name) if want else None for name, want in wanted.items()}
    sources = tuple(
        (
            name,
            kernel.source
            if kernel
            else "torch (no fused kernel is installed for this device)"
            if wanted[name]
            else "torch",
        )
        for name, kernel in found.items()
    )
    return Kernels(**{name: kernel.call for name, kernel in found.items() if kernel}, sources=sources)
