"""Checks of the flags that choose kernels. No torch."""

from ascendspeed.config.schema import Run, TrainConfig
from ascendspeed.utils.errors import UserError


def check_triton(train: TrainConfig) -> None:
    """Raises UserError for --triton-kernels auto or off together with anything else."""
    alone = [value for value in train.triton_kernels if value in ("auto", "off")]
    if alone and len(train.triton_kernels) > 1:
        raise UserError(
            f"--triton-kernels {' '.join(train.triton_kernels)}: give {alone[0]} alone, or operations"
        )


def check_compile(run: Run) -> None:
    """Raises UserError for an activation memory budget out of range or without --compile."""
    budget = run.train.compile_activation_memory_budget
    if budget is None:
        return
    flag = f"--compile-activation-memory-budget {budget:g}"
    if not 0 < budget <= 1:
        raise UserError(f"{flag}: must be above 0 and at most 1")
    if not run.train.compile:
        raise UserError(f"{flag} belongs to --compile; add it")
