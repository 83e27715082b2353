"""Checks of the flags that choose kernels. No torch."""

from ascendspeed.config.schema import TrainConfig
from ascendspeed.utils.errors import UserError


def check_triton(train: TrainConfig) -> None:
    """Raises UserError for --triton-kernels auto or off together with anything else."""
    alone = [value for value in train.triton_kernels if value in ("auto", "off")]
    if alone and len(train.triton_kernels) > 1:
        raise UserError(
            f"--triton-kernels {' '.join(train.triton_kernels)}: give {alone[0]} alone, or operations"
        )
