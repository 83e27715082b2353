"""Tensor-parallel linears with an inference fast path and with the products of `Kernels.linear`.

Without gradients they give equal results without Megatron-core's autograd functions, which keep inputs for a
backward pass: for the forward pass of a single token these take a fifth of the time. If `Kernels.linear` is
not torch's, `KernelLinear` takes the place of these functions.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ascendspeed.distributed import fused_kernels
from ascendspeed.models import int8, nf4, quantized_weight


def use_weight_gradient(kernel: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Makes `kernel` (x, gradient of the output, fp32 sum) the product with which Megatron-core's linears add
    weight gradients, in place of the extension of Apex that they look for."""
    megatron_layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=kernel)
    megatron_layers._grad_accum_fusion_available = True


class KernelLinear(torch.autograd.Function):
    """Product of `Kernels.linear` with its two gradients and the communication of Megatron-core's
    `LinearWithGradAccumulationAndAsyncCommunication`; a frozen weight costs neither memory nor a product. A
    weight in 8 or 4 bits is dequantised in every pass, and nothing else of it is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        linear: Any,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: Any,
        scale: Tensor | None = None,
    ) -> Tensor:
        """x [s, b, k] (under sequence parallel [s / TP, b, k]), weight [n, k], bias [n] -> [s, b, n].

        `allreduce_dgrad`: sums the gradient of x over `group`. `scale`: those of a quantised weight.
        """
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.scale = scale
        ctx.linear, ctx.group = linear, group
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        if sequence_parallel:
            x = _gather_sequence(x, group)[0]
        out = linear(x, weight if scale is None else quantized_weight.dequantize(weight, scale, x.dtype))
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Communication runs beside the products, in the order of Megatron-core's function."""
        x, weight = ctx.saved_tensors
        if ctx.scale is not None:
            weight = quantized_weight.dequantize(weight, ctx.scale, gradient.dtype)
        gathering = exchange = None
        if x is not None and ctx.sequence_parallel:
            x, gathering = _gather_sequence(x, ctx.group, async_op=True)
        dgrad = ctx.linear(gradient, weight.t())
        if ctx.sequence_parallel:
            partial = dgrad
            dgrad = partial.new_empty(partial.size(0) // ctx.group.size(), *partial.shape[1:])
            exchange = dist.reduce_scatter_tensor(dgrad, partial, group=ctx.group, async_op=True)
        elif ctx.allreduce_dgrad:
            exchange = dist.all_reduce(dgrad, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        rows = gradient.reshape(-1, gradient.size(-1))
        wgrad = None if x is None else ctx.linear(rows.t(), x.reshape(-1, x.size(-1)).t())
        bias_grad = rows.sum(0) if ctx.needs_input_grad[2] else None
        if exchange is not None:
            exchange.wait()
        return dgrad, wgrad, bias_grad, None, None, None, None, None


def differentiable(x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x [..., k], weight [n, k] -> x weight^T [..., n] by a `Kernels.linear`, with its gradients."""
    if product is fused_kernels.linear:
        return F.linear(x, weight)
    return KernelLinear.apply(x, weight, None, product, False, False, None)


def _gather_sequence(x: Tensor, group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """Gathers x [s / TP, ...] to [s, ...] in Megatron-core's buffer; and, if `async_op`, the handle."""
    shape = [x.size(0) * group.size(), *x.shape[1:]]
    gathered = get_global_memory_buffer().get_tensor(shape, x.dtype, "mpu")
    return gathered, dist.all_gather_into_tensor(gathered, x.contiguous(), group=group, async_op=async_op)


class InferenceLinear(torch.nn.Module):
    """Mixin of linears whose weight can have the layout of `Kernels.pack_weight`, or be quantised."""

    weight: torch.nn.Parameter
    weight_scale: Tensor | None = None
    """Scales of a quantised weight: `quantized_weight.dequantize`."""
    config: Any
    tp_group: Any

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., k], weight [n, k] -> x weight^T [..., n], without a gradient."""
        if self.weight_scale is None:
            return self.config.kernels.linear(x, weight)
        if quantized_weight.is_nf4(weight):
            return self.config.kernels.linear(x, nf4.dequantize(weight, self.weight_scale, x.dtype))
        kernels = self.config.kernels
        own = kernels.int8_linear.kernel if kernels.int8_linear else None
        return int8.linear(x, weight, self.weight_scale, kernels.linear, own)

    @torch.no_grad()
    def set_int8_weight(self, weight: Tensor) -> None:
        """Replaces the weight by this rank's part [n, k] of a plain one, in int8, which is frozen.

        Collective for a weight that is cut along its inputs: all ranks take the scales of whole rows.
        """
        weight = weight.to(self.weight.device)
        largest = weight.abs().amax(-1, keepdim=True)
        if isinstance(self, RowParallelLinear) and self.tp_group.size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.tp_group)
        numbers, self.weight_scale = int8.quantize(weight, self.config.params_dtype, largest)
        self._replace_weight(numbers)

    @torch.no_grad()
    def set_nf4_weight(self, weight: Tensor) -> None:
        """Replaces the weight by this rank's part [n, k] of a plain one, in NF4, which is frozen."""
        numbers, self.weight_scale = nf4.quantize(weight.to(self.weight.device))
        self._replace_weight(numbers)

    @torch.no_grad()
    def pack(self) -> None:
        """Replaces the weight by its packed copy; no training afterwards."""
        if self.weight_scale is None and not self.weight.is_mkldnn:
            self._replace_weight(self.config.kernels.pack_weight(self.weight))

    @torch.no_grad()
    def unpack(self) -> None:
        """Restores the plain weight, bit for bit."""
        if self.weight.is_mkldnn:
            self._replace_weight(self.weight.to_dense())

    def _replace_weight(self, weight: Tensor) -> None:
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


class ColumnLinear(InferenceLinear, ColumnParallelLinear):
    """Linear with its weight cut along the rows (outputs) over the tensor-parallel ranks."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [..., h] -> ([..., out / TP] or, gathered, [..., out]; bias that the caller must add).

        `weight` [out / TP, h] replaces the layer's own.
        """
        if torch.compiler.is_compiling():
            return _traced_linear(self, input_, self.weight if weight is None else weight)
        if torch.is_grad_enabled() or _needs_megatron_forward(self):
            return super().forward(input_, weight, runtime_gather_output)
        out = self.multiply(input_, self.weight if weight is None else weight)
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            out = gather_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out, self.bias if self.skip_bias_add else None

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        if self.weight_scale is None and self.config.kernels.linear is fused_kernels.linear:
            return super()._forward_impl(input=input, weight=weight, **settings)
        return _kernel_linear(self, input, weight, settings)


class RowLinear(InferenceLinear, RowParallelLinear):
    """Linear with its weight cut along the columns (inputs); the ranks' outputs are summed."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [..., in / TP] -> ([..., h], bias that the caller must add)."""
        if torch.compiler.is_compiling():
            return _traced_linear(self, input_, self.weight)
        if torch.is_grad_enabled() or _needs_megatron_forward(self) or not self.input_is_parallel:
            return super().forward(input_)
        out = self.multiply(input_, self.weight)
        if self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        return out, self.bias if self.skip_bias_add else None

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        if self.weight_scale is None and self.config.kernels.linear is fused_kernels.linear:
            return super()._forward_impl(input=input, weight=weight, **settings)
        return _kernel_linear(self, input, weight, settings)


def _needs_megatron_forward(linear: ColumnLinear | RowLinear) -> bool:
    """True if the linear communicates in more ways than one sum or gather."""
    return linear.sequence_parallel or linear.explicit_expert_comm


def _traced_linear(
    linear: ColumnLinear | RowLinear, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Forward pass of a linear in a compiled layer, which only a single tensor-parallel rank has:
    Megatron-core's own would divide the graph of the layer.

    x [..., k], weight [n, k] -> ([..., n], bias that the caller must add).
    """
    kernels, bias = linear.config.kernels, None if linear.skip_bias_add else linear.bias
    product = kernels.linear
    if kernels.fp8_product is not None:
        out = kernels.fp8_product(x, weight)
        out = out if bias is None else out + bias
    elif linear.weight_scale is None and product is fused_kernels.linear:
        out = F.linear(x, weight, bias)
    else:
        out = KernelLinear.apply(x, weight, bias, product, False, False, None, linear.weight_scale)
    return out, linear.bias if linear.skip_bias_add else None


def _kernel_linear(
    linear: ColumnLinear | RowLinear, x: Tensor, weight: Tensor, settings: dict[str, Any]
) -> Tensor:
    """`KernelLinear` with the arguments that Megatron-core gives to its own functions."""
    if linear.weight_scale is not None and not torch.is_grad_enabled():
        out = linear.multiply(x, weight)
        return out if settings["bias"] is None else out + settings["bias"]
    return KernelLinear.apply(
        x,
        weight,
        settings["bias"],
        linear.config.kernels.linear,
        settings["allreduce_dgrad"],
        settings["sequence_parallel"],
        linear.tp_group,
        linear.weight_scale,
    )
