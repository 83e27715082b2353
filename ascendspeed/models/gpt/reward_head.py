"""Scalar head of a reward model, in the place of the output layer."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.device import current_device
from ascendspeed.models.gpt.layer_spec import GPTConfig


class RewardHead(torch.nn.Module):
    """Linear [1, h] without bias, computed in fp32; every tensor-parallel rank holds all of it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=current_device())
        )
        # Under sequence parallel a rank scores its own positions: the ranks' gradients are summed.
        self.sequence_parallel = self.weight.sequence_parallel = config.sequence_parallel

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """input_ [s / TP, b, h] under sequence parallel, else [s, b, h] -> scores [s, b, 1], fp32."""
        scores = F.linear(input_.float(), self.weight.float())
        if self.sequence_parallel:
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False)
        return scores, None
