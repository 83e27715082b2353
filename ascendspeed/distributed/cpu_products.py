"""Number format and sizes of the matrix products of a command, by which a CPU's kernel for them is chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ascendspeed.config.schema import CpuLinearChoice, ModelConfig, ParallelConfig, Run

Linear = Callable[[Tensor, Tensor], Tensor]
"""x [..., k], weight [n, k] -> x weight^T [..., n]."""


@dataclass(frozen=True)
class Products:
    """Number format and largest matrix product of a command, for the choice of its kernel."""

    choice: CpuLinearChoice
    """Value of --cpu-linear."""
    dtype: str
    """fp32, bf16 or fp16."""
    outputs: int
    """Rows of the largest weight of a layer on one rank."""
    inputs: int
    """Columns of that weight."""
    rows: int | None = None
    """Tokens of a training pass on one rank; None: inference, for which weights are packed."""

    @classmethod
    def of_training(cls, run: Run) -> "Products":
        """Products of a training run."""
        rows = run.train.micro_batch_size * run.data.seq_length // run.parallel.context_parallel_size
        choice = run.train.cpu_linear
        if choice == "auto" and run.train.deterministic and run.optim.dtype == "fp32":
            choice = "torch"  # a measurement may choose otherwise in the next run
        return cls(choice, run.optim.dtype, *_largest_weight(run.model, run.parallel), rows)

    @classmethod
    def of_inference(
        cls, choice: CpuLinearChoice, dtype: str, model: ModelConfig, parallel: ParallelConfig
    ) -> "Products":
        """Products of generation and evaluation."""
        return cls(choice, dtype, *_largest_weight(model, parallel))


def _largest_weight(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Shape of linear_fc1 on one rank."""
    return 2 * max(model.ffn_widths) // parallel.tensor_model_parallel_size, model.hidden_size


def rank() -> int:
    """This process's rank; 0 before process groups exist."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_ranks(value: bool) -> bool:
    """True if `value` is true on every rank. Collective."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
