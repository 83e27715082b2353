"""Tensor-parallel linears with an inference fast path: without gradients, equal results without the autograd
functions.

Megatron-core's autograd functions keep inputs for a backward pass; for the forward pass of a single token
they take a fifth of the time.
"""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.nn import functional as F


class ColumnLinear(ColumnParallelLinear):
    """Linear with its weight cut along the rows (outputs) over the tensor-parallel ranks."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [..., h] -> ([..., out / TP] or, gathered, [..., out]; bias that the caller must add).

        `weight` [out / TP, h] replaces the layer's own.
        """
        if torch.is_grad_enabled() or _needs_megatron_forward(self):
            return super().forward(input_, weight, runtime_gather_output)
        out = F.linear(input_, self.weight if weight is None else weight)
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            out = gather_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out, self.bias if self.skip_bias_add else None


class RowLinear(RowParallelLinear):
    """Linear with its weight cut along the columns (inputs); the ranks' outputs are summed."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [..., in / TP] -> ([..., h], bias that the caller must add)."""
        if torch.is_grad_enabled() or _needs_megatron_forward(self) or not self.input_is_parallel:
            return super().forward(input_)
        out = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        return out, self.bias if self.skip_bias_add else None


def _needs_megatron_forward(linear: ColumnLinear | RowLinear) -> bool:
    """True if the linear communicates in more ways than one sum or gather."""
    return linear.sequence_parallel or linear.explicit_expert_comm
