"""Device kernels of the layers: RMSNorm, rotary embedding, SwiGLU, attention within sequences, and the sum of
weight gradients."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ascendspeed.distributed.device import Device
from ascendspeed.distributed.inference_kernels import future_mask

NPU_SEQUENCES = 1024
"""Most sequences of one call of npu_fusion_attention in the layout TND (torch_npu 2.13's documentation)."""


@dataclass(frozen=True)
class FusedKernel:
    """A fused kernel of the device."""

    source: str
    """Package and function, for the log."""
    call: Callable[..., Any]


class SequenceBounds(NamedTuple):
    """Boundaries of consecutive sequences."""

    ends: list[int]
    """End of every sequence; the last one is the number of tokens."""
    cumulative: Tensor
    """int32 [sequences + 1] on the device: 0, then the ends."""
    longest: int
    """Tokens of the longest sequence."""


def fused_kernel(device: Device, operation: str) -> FusedKernel | None:
    """The device's fused kernel for an operation, or None if none is installed; x is [s, b, ...]:

    - `rms_norm(x, weight, eps)`;
    - `rotary(x, cos, sin)`: x [s, b, heads, d], cos and sin [s, 1 or b, 1, d];
    - `swiglu(x)`: x is [gate; up] in the last dimension;
    - `weight_gradient(x, gradient, total)`: adds gradientᵀ · x to total, in fp32: x [n, k] and gradient
      [n, m] in bf16, total [m, k];
    - `varlen(q, k, v, bounds)`: causal attention within each of many sequences, in bf16 or fp16, d a multiple
      of 8 up to 256; q [tokens, heads, d], k and v [tokens, groups, d].
    """
    lookup = {"npu": _npu_kernel, "cuda": _cuda_kernel}.get(device.kind)
    return lookup(operation) if lookup else None


def _npu_kernel(operation: str) -> FusedKernel | None:
    if operation == "weight_gradient":
        return None
    npu = importlib.import_module("torch_npu")
    if operation == "varlen":
        return FusedKernel(
            "torch_npu.npu_fusion_attention", functools.partial(_varlen_npu, npu.npu_fusion_attention)
        )
    return {
        "rms_norm": FusedKernel(
            "torch_npu.npu_rms_norm", lambda x, weight, eps: npu.npu_rms_norm(x, weight, epsilon=eps)[0]
        ),
        "rotary": FusedKernel(
            "torch_npu.npu_rotary_mul", lambda x, cos, sin: npu.npu_rotary_mul(x, cos, sin)
        ),
        "swiglu": FusedKernel("torch_npu.npu_swiglu", lambda x: npu.npu_swiglu(x, dim=-1)),
    }[operation]


def _cuda_kernel(operation: str) -> FusedKernel | None:
    """Liger's kernels, else Apex's RMSNorm; flash-attention, else torch's own version of it.

    There is no rotary kernel: Liger's takes [b, heads, s, d] and rotates q and k in one call.
    """
    if operation == "varlen":
        return _varlen_cuda()
    if operation == "weight_gradient":
        return FusedKernel("torch.addmm", _add_weight_gradient)
    if importlib.util.find_spec("liger_kernel") and operation == "rms_norm":
        norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return FusedKernel(
            "liger_kernel.ops.rms_norm",
            lambda x, weight, eps: norm.apply(x, weight, eps, 0.0, "llama", False),
        )
    if importlib.util.find_spec("liger_kernel") and operation == "swiglu":
        glu = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return FusedKernel(
            "liger_kernel.ops.swiglu", lambda x: glu.apply(*(half.contiguous() for half in x.chunk(2, -1)))
        )
    if importlib.util.find_spec("apex") and operation == "rms_norm":
        affine = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
        return FusedKernel(
            "apex.fused_rms_norm_affine", lambda x, weight, eps: affine(x, weight, weight.shape, eps)
        )
    return None


def _add_weight_gradient(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """A product of bf16 matrices that reads and writes its fp32 sum."""
    torch.addmm(total, gradient.t(), x, out_dtype=torch.float32, out=total)


def _varlen_cuda() -> FusedKernel | None:
    if importlib.util.find_spec("flash_attn"):
        flash = importlib.import_module("flash_attn").flash_attn_varlen_func
        return FusedKernel(
            "flash_attn.flash_attn_varlen_func",
            functools.partial(_varlen_flash, flash, {"causal": True}, True),
        )
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        parameters = inspect.signature(varlen).parameters  # they differ between versions of torch
        options: dict[str, Any] = (
            {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
        )
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        return FusedKernel(
            "torch.nn.attention.varlen",
            functools.partial(_varlen_flash, varlen, options, "enable_gqa" in parameters),
        )
    return None


def _varlen_flash(
    kernel: Callable,
    options: dict[str, Any],
    supports_gqa: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: SequenceBounds,
) -> Tensor:
    """`supports_gqa`: True if the kernel accepts fewer key heads than query heads."""
    if not supports_gqa:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    return kernel(q, k, v, bounds.cumulative, bounds.cumulative, bounds.longest, bounds.longest, **options)


def _varlen_npu(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds) -> Tensor:
    """Calls the kernel for at most `NPU_SEQUENCES` sequences at a time."""
    parts = []
    start = 0
    for first in range(0, len(bounds.ends), NPU_SEQUENCES):
        ends = bounds.ends[first : first + NPU_SEQUENCES]
        relative = [end - start for end in ends]
        attended = kernel(
            *(x[start : ends[-1]] for x in (q, k, v)),
            *(q.size(1), "TND"),
            atten_mask=future_mask(q.device),  # a fixed size, whatever the lengths
            sparse_mode=3,  # causal within each sequence
            scale=q.size(-1) ** -0.5,
            actual_seq_qlen=relative,
            actual_seq_kvlen=relative,
        )
        parts.append(attended[0])
        start = ends[-1]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
