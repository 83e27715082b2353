"""The engines: one protocol, same loss. `deepspeed` has ZeRO 0-3, `megatron` pipelines, context and expert parallel."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ascendspeed.checkpoint.fragment import Fragment
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.config.schema import Run
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import ProcessGrid

logger = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, Tensor]]
"""Weights by our names, full."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    loss: float
    """Mean over the counted tokens of the global batch; NaN or infinite as it came."""
    tokens: int
    """Counted tokens of the global batch."""
    grad_norm: float | None
    """Global norm before clipping."""
    skipped: bool
    """The loss or the gradients were not finite: nothing was updated. The same on every rank."""
    loss_scale: float
    bad: tuple[int, ...] = ()
    """Of this rank's micro-batches those, by their place, whose loss was not finite."""


NOTHING = StepResult(loss=math.nan, tokens=0, grad_norm=None, skipped=True, loss_scale=1.0)
"""Of a global batch in which no token counts. An update would still move weights: by momentum, and by their decay."""


class Engine(Protocol):
    """What the training loop asks of an engine."""

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """Forward and backward over this rank's micro-batches of one global batch, and one update at learning rate `lr`."""

    @property
    def updates(self) -> int:
        """Updates done: Adam's own step, iterations less skipped ones."""

    def loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Sum of the token losses over all ranks' batches, and the tokens that count; no update."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the optimizer: live views, for saving and for restoring."""

    def scalars(self) -> dict[str, Any]:
        """The engine's numbers that a checkpoint keeps (updates, loss scaler)."""

    def rng(self) -> dict[str, Tensor]:
        """This rank's random number generators."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes weights, moments, scalars and (in the same layout) the generators from a checkpoint of any layout and engine."""


def builder(
    run: Run, grid: ProcessGrid, device: Device, kernels: Kernels
) -> Callable[[Tensors | None], Engine]:
    """The engine of a run, still to be given its weights (None: `restore` follows).

    Raises `UserError` when --deepspeed_config contradicts the flags.
    """
    if not run.parallel.deepspeed:
        from ascendspeed.training.engines.megatron import MegatronEngine

        logger.info(
            f"engine: Megatron-core, {'distributed' if run.parallel.use_distributed_optimizer else 'replicated'} optimizer"
        )
        return lambda tensors: MegatronEngine(run, grid, device, kernels, tensors)
    from ascendspeed.training.engines.deepspeed import DeepSpeedEngine, ds_config

    config = ds_config(run, grid.world)
    logger.info(f"DeepSpeed config: {json.dumps(config)}")
    if grid.rank == 0:
        Path(run.train.log_dir, "ds_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return lambda tensors: DeepSpeedEngine(run, grid, device, config, kernels, tensors)
