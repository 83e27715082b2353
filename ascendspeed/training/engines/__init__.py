"""Training engines behind one protocol, with equal losses.

`deepspeed` has ZeRO 0-3; `megatron` has pipeline, context and expert parallelism.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ascendspeed.checkpoint.fragment import Fragment
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.config.schema import Run
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed.device import Device, use_host_cores
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import ProcessGrid

logger = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, Tensor]]
"""(Megatron name, full unpadded tensor) of every weight."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step."""

    loss: float
    """Mean over the items of the global batch; may be NaN or infinite."""
    items: int
    """Items of the objective in the global batch: supervised tokens, or pairs."""
    grad_norm: float | None
    """Global gradient norm before clipping."""
    skipped: bool
    """True if the loss or the gradients were not finite, so that nothing was updated; equal on every rank."""
    loss_scale: float
    aux_loss: float | None = None
    """Load-balancing loss of the experts, without its coefficient; None without one."""
    z_loss: float | None = None
    """z-loss of the routers, without its coefficient."""
    bad: tuple[int, ...] = ()
    """Indices of this rank's micro-batches with a non-finite loss."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further means over the items, by the field of `TrainLine`."""


EMPTY_STEP = StepResult(loss=math.nan, items=0, grad_norm=None, skipped=True, loss_scale=1.0)
"""Result for a global batch without items, such as supervised tokens: an update would still move weights, by
momentum and weight decay.
"""


class Engine(Protocol):
    """Interface between the training loop and an engine."""

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """Runs forward and backward over this rank's micro-batches of one global batch, then one update at
        learning rate `lr`.
        """

    @property
    def updates(self) -> int:
        """Number of updates: Adam's step, iterations minus skipped ones."""

    def loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Sum of the losses over all ranks' batches and the number of items; no update."""

    def score(self, batches: Sequence[Batch], adapters: bool = True) -> list[Tensor]:
        """See `objectives.Scorer.score`."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's shard of every weight of its pipeline stage, by Megatron name, in the number format of
        the forward pass; valid until the next one is taken. Collective.
        """

    def fragments(self) -> Iterator[Fragment]:
        """Live views of the optimizer state that this rank owns, for saving and for restoring."""

    def scalars(self) -> dict[str, Any]:
        """The engine's scalars in a checkpoint: updates, loss scaler."""

    def rng(self) -> dict[str, Tensor]:
        """States of this rank's random-number generators."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Loads weights, moments, scalars and (in the same layout) generator states from a checkpoint of any
        layout and engine.
        """


def engine_builder(
    run: Run, grid: ProcessGrid, device: Device, kernels: Kernels
) -> Callable[[Tensors | None], Engine]:
    """Chooses and logs the engine of a run; the result builds it from weights (None: `restore` follows).

    Raises `UserError` when --deepspeed_config contradicts the flags or DeepSpeed refuses it.
    """
    if run.parallel.use_torch_fsdp2:
        from ascendspeed.training.engines.fsdp import FsdpEngine

        logger.info("engine: Megatron-core with torch's FSDP2")
        return lambda tensors: FsdpEngine(run, grid, device, kernels, tensors)
    if not run.parallel.deepspeed:
        from ascendspeed.training.engines.megatron import MegatronEngine

        logger.info(
            "engine: Megatron-core, "
            f"{'distributed' if run.parallel.use_distributed_optimizer else 'replicated'} optimizer"
        )
        return lambda tensors: MegatronEngine(run, grid, device, kernels, tensors)
    from ascendspeed.training.engines import deepspeed_check
    from ascendspeed.training.engines.deepspeed import DeepSpeedEngine, import_deepspeed
    from ascendspeed.training.engines.deepspeed_config import ds_config, read_additions

    run = without_idle_zero(run, grid)
    config = ds_config(run, grid.world)
    if path := run.parallel.deepspeed_config:
        import_deepspeed(device)
        deepspeed_check.check(config, read_additions(path), path)
    if run.parallel.zero_offload != "none":
        threads = use_host_cores(device)
        logger.info(f"offload: the update runs on the host, with {threads} threads per process")
    copy = Path(run.train.log_dir, "ds_config.json")
    text = f"DeepSpeed config: {json.dumps(config)}"
    logger.info(text, extra={"terminal": f"DeepSpeed config: {copy}"})
    if grid.rank == 0:
        copy.write_text(json.dumps(config, indent=2) + "\n")
    return lambda tensors: DeepSpeedEngine(run, grid, device, config, kernels, tensors)


def without_idle_zero(run: Run, grid: ProcessGrid) -> Run:
    """Returns the run with ZeRO stage 0 instead of 1 or 2 where these share nothing, and logs it.

    In fp32 with one data-parallel rank they would keep a second copy of the weights and move every gradient
    three times.
    """
    parallel = run.parallel
    is_idle = parallel.zero_stage in (1, 2) and run.optim.dtype == "fp32" and grid.dp_cp == 1
    if not is_idle or parallel.zero_offload != "none" or parallel.deepspeed_config:
        return run
    logger.info(
        f"note: ZeRO stage {parallel.zero_stage} shares nothing with one data-parallel rank: stage 0 is "
        "used, which keeps no second copy of the fp32 weights"
    )
    return replace(run, parallel=replace(parallel, zero_stage=0))
