"""Megatron-core's tensor-parallel linears, which go a shorter way to the same numbers where no gradient is wanted.

Their own way leads through autograd functions that keep what a backward pass needs: of a single token's pass it is a fifth.
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
    """Every rank has some of the rows of the weight, and gives as many of the outputs."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [..., h], weight [out / TP, h] for the layer's own -> [..., out / TP] or, gathered, [..., out]; bias to add."""
        if torch.is_grad_enabled() or _special(self):
            return super().forward(input_, weight, runtime_gather_output)
        out = F.linear(input_, self.weight if weight is None else weight)
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            out = gather_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out, self.bias if self.skip_bias_add else None


class RowLinear(RowParallelLinear):
    """Every rank has some of the columns of the weight, and some of the inputs; the outputs are summed."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [..., in / TP] -> [..., h]; bias to add."""
        if torch.is_grad_enabled() or _special(self) or not self.input_is_parallel:
            return super().forward(input_)
        out = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.bias is not None and not self.skip_bias_add:
            out = out + self.bias
        return out, self.bias if self.skip_bias_add else None


def _special(linear: ColumnLinear | RowLinear) -> bool:
    """Whether more is to be done than to multiply and to sum or gather."""
    return linear.sequence_parallel or linear.explicit_expert_comm
