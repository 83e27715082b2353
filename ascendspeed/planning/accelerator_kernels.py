"""Stand-ins for the kernels of an accelerator: the shapes that they return and the tensors that they keep."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.training_kernels import SequenceBounds


class _RmsNorm(torch.autograd.Function):
    """torch's own fused kernel: keeps the input and 1 / rms of every row in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


class _Attention(torch.autograd.Function):
    """Flash attention: keeps q, k, v, the output and the log-sum-exp of every row in fp32.

    `dim`: dimension of the heads.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dim: int) -> Tensor:
        out = _laid_out_as_tokens(q, dim)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        ctx.dim = dim
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return *(_laid_out_as_tokens(x, ctx.dim) for x in (q, k, v)), None


def _laid_out_as_tokens(x: Tensor, dim: int) -> Tensor:
    """An empty tensor like x whose heads are next to each other in memory, as the kernels write it."""
    moved = x.movedim(dim, -2)
    return torch.empty(moved.shape, dtype=x.dtype, device=x.device).movedim(-2, dim)


class _SwiGlu(torch.autograd.Function):
    """A kernel that keeps only [gate; up]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], x.size(-1) // 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.empty_like(gradient), None, None


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _RmsNorm.apply(x, weight, eps)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return _Attention.apply(q, k, v, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds) -> Tensor:
    return _Attention.apply(q, k, v, 1)


def _add_weight_gradient(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """The product that adds to its fp32 sum allocates nothing."""


STAND_INS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, weight, eps: _RmsNorm.apply(x, weight, eps),
    "swiglu": lambda x: _SwiGlu.apply(x),
    "rotary": lambda x, cos, sin: _Rotary.apply(x, cos, sin),
    "varlen": _varlen,
    "weight_gradient": _add_weight_gradient,
}
"""Operation of `Kernels` -> its stand-in."""


def kernels(**enabled: bool) -> Kernels:
    """The kernels of an accelerator for the enabled operations; torch's for the others."""
    return Kernels(**{name: STAND_INS[name] for name, is_enabled in enabled.items() if is_enabled})


@contextlib.contextmanager
def as_accelerator() -> Iterator[None]:
    """torch's operations keep what they keep on an accelerator, and the loss has slices of its size."""
    from ascendspeed.models.gpt import cross_entropy

    elements = cross_entropy.DEVICE_SLICE_ELEMENTS
    with (
        patch.object(F, "scaled_dot_product_attention", _attention),
        patch.object(F, "rms_norm", _rms_norm),
        patch.object(cross_entropy, "CPU_SLICE_ELEMENTS", elements),
    ):
        yield
