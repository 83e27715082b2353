"""Operations with optional fused kernels: plain torch, or the device's own kernel if a flag enables it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed import fp32_products, inference_kernels, onednn
from ascendspeed.distributed.cpu_products import Products
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.inference_kernels import Int8Linear, PagedAttention
from ascendspeed.distributed.layer_compiler import LayerCompiler
from ascendspeed.distributed.training_kernels import SequenceBounds, fused_kernel
from ascendspeed.distributed.triton_kernels import selection

NO_KERNEL = "torch (no fused kernel is installed for this device)"
"""Source of an operation that is enabled."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467); x [..., h], weight
    [h]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of every head (arXiv 2104.09864, Llama's layout): x [s, b, heads, d]; cos, sin [s, 1
    or b, 1, d]."""
    return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202); x [..., 2f] holds [gate; up] -> [..., f]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """gelu(gate) · up (arXiv 2002.05202), gelu by its tanh approximation; x [..., 2f] holds [gate; up] ->
    [..., f]."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T; x [..., k], weight [n, k] -> [..., n].

    Not F.linear itself, which DeepSpeed replaces at ZeRO stage 3: torch's product is recognised by this
    function.
    """
    return F.linear(x, weight)


class _Rotary(torch.autograd.Function):
    """Rotation whose backward pass is the inverse rotation, half the passes over memory of autograd's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotary.apply(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x_first, x_second = x.chunk(2, -1)
    sin_first, sin_second = sin.chunk(2, -1)
    out = x * cos
    out_first, out_second = out.chunk(2, -1)
    out_first.addcmul_(x_second, sin_first, value=-1)
    out_second.addcmul_(x_first, sin_second)
    return out


@dataclass(frozen=True)
class CrossEntropyKernel:
    """The two passes of cross entropy over the logits [n, V] of a vocabulary shard.

    labels int64 [n] index the shard; one outside 0 ... V - 1 belongs to another rank. All others: fp32 [n].
    """

    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """logits, labels -> largest logit, sum of exp(logit - largest), logit of the label or 0."""
    write_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int], None]
    """logits, labels, largest, scale, at_label, share, columns: overwrites the logits by exp(logit - largest)
    · scale, plus at_label at the label, minus share in the first columns."""


@dataclass(frozen=True)
class Kernels:
    """The operations in use and their sources."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor] = rotary
    swiglu: Callable[[Tensor], Tensor] = swiglu
    geglu: Callable[[Tensor], Tensor] = geglu
    cross_entropy: CrossEntropyKernel | None = None
    """The loss; None: torch's operations, in slices of rows."""
    varlen: Callable[[Tensor, Tensor, Tensor, SequenceBounds], Tensor] | None = None
    """Causal attention within each of many sequences; None: torch's SDPA, one sequence after the other."""
    linear: Callable[[Tensor, Tensor], Tensor] = linear
    """x [..., k], weight [n, k] -> x weight^T [..., n]. Another one than torch's has no gradient; its callers
    compute the gradients by further products."""
    pack_weight: Callable[[Tensor], Tensor] | None = None
    """Weight of inference [n, k] -> the layout that `linear` reads fastest; None: it has no own layout."""
    weight_gradient: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """Adds the weight gradient of a linear to its fp32 sum: x [n, k], gradient of the output [n, m], sum [m,
    k]; None: the product is rounded to the number format of the weights and added afterwards."""
    fp8_product: Callable[[Tensor, Tensor], Tensor] | None = None
    """Product of the linears of compiled layers, with its gradients: x [..., k], weight [n, k] -> [..., n];
    None: that of `linear`."""
    sdpa_backend: str | None = None
    """Backend of torch's attention (`sdpa_backend.BACKENDS`); None: torch's choice."""
    attention_dtype: torch.dtype | None = None
    """Number format in which torch's attention is computed; None: that of its operands."""
    layer_compiler: LayerCompiler | None = None
    """Compiles the transformer layers; None: they run as they are written."""
    paged: PagedAttention | None = None
    """Attention over a paged cache; None: keys are gathered for torch's SDPA."""
    int8_linear: Int8Linear | None = None
    """Product with an int8 weight; None: `int8.linear` chooses."""
    sources: tuple[tuple[str, str], ...] = (("rms_norm", "torch"), ("rotary", "torch"), ("swiglu", "torch"))

    def __str__(self) -> str:
        operations: dict[str, list[str]] = {}
        for operation, source in self.sources:
            operations.setdefault(source, []).append(operation)
        return "; ".join(f"{', '.join(names)}: {source}" for source, names in operations.items())


def select_kernels(
    device: Device, products: Products | None = None, triton: Sequence[str] = (), **enabled: bool
) -> Kernels:
    """Selects the device's fused kernel for every enabled operation that has one, and torch for the others.

    `products`: chooses the product of a CPU; collective. `triton`: --triton-kernels, whose
    kernels come before others. Example: `select_kernels(device, rms_norm=True, rotary=False)`.
    """
    triton_kernels, problem = selection.select(device, triton)
    kernels: dict[str, Any] = {**triton_kernels}
    sources = dict.fromkeys(kernels, "triton")
    for operation, is_enabled in enabled.items():
        if operation in kernels:
            continue
        kernel = fused_kernel(device, operation) if is_enabled else None
        if kernel:
            kernels[operation] = kernel.call
            sources[operation] = kernel.source
        elif is_enabled:
            sources[operation] = NO_KERNEL
        else:
            sources[operation] = "torch"
    if problem:
        without = {"", "torch", NO_KERNEL}
        names = [name for name in selection.OPERATIONS if sources.get(name, "") in without]
        sources |= dict.fromkeys(names, f"torch (no Triton: {problem})")
    if products:
        cpu_kernels, sources["linear"] = _cpu_products(products, device)
        kernels |= cpu_kernels
        if "attention_dtype" in cpu_kernels:
            sources["attention"] = sources["linear"]
    return Kernels(**kernels, sources=tuple(sources.items()))


def _cpu_products(products: Products, device: Device) -> tuple[dict[str, Any], str]:
    """The kernels for matrix products on a CPU, by their names in `Kernels`, and their source. Collective."""
    if products.dtype == "fp32":
        product, source = onednn.choose(products, device)
        return ({"linear": product, "pack_weight": onednn.pack} if product else {}), source
    product, source = fp32_products.choose(products, device)
    # A forward pass of attention alone is as fast in bf16.
    of_training = {"attention_dtype": torch.float32} if products.rows else {}
    return ({"linear": product} | of_training if product else {}), source


def with_inference_kernels(kernels: Kernels, device: Device, dtype: str) -> Kernels:
    """Adds the device's kernels of inference, which take bf16 and fp16; the others stay. Collective on a
    device."""
    if dtype == "fp32":
        return kernels
    paged, source = inference_kernels.paged_attention(device.kind, device.torch)
    int8_linear, int8_source = inference_kernels.int8_linear(device.kind, device.torch)
    named = (("paged attention", source), ("int8 product", int8_source))
    sources = (*kernels.sources, *(item for item in named if item[1]))
    return replace(kernels, paged=paged, int8_linear=int8_linear, sources=sources)
