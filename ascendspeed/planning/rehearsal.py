"""Dry run of training in one process: opens what the run would open, plans its memory, and starts nothing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed.config.batch_schedule import batch_sizes
from ascendspeed.config.schema import Run
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.planning import auto_recompute, command, memory_plan, report
from ascendspeed.planning.memory_plan import KernelChoice
from ascendspeed.training import data_setup, setup, trackers
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoneGrid(ProcessGrid):
    """Rank 0 of a run whose other ranks do not exist: it gathers its own values only."""

    def barrier(self) -> None:
        """Nobody else is waiting."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """The value of this rank."""
        return [value]


def rehearse(run: Run, devices: int, device: Device, kernels: KernelChoice) -> None:
    """Checks trackers, data, weights, --save and DeepSpeed's file of a run on `devices` devices, and logs
    what it would do and need.

    `device`: the prepared CPU. Raises `UserError` for what training would refuse.
    """
    trackers.check_installed(trackers.names_of(run.train))
    parallel = run.parallel
    grid = LoneGrid(
        rank=0,
        world=1,
        tp_rank=0,
        tp=parallel.tensor_model_parallel_size,
        dp_rank=0,
        dp=devices // parallel.model_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
    )
    _check_deepspeed(run, devices, device)
    run, batches = data_setup.open_data(run, grid)
    with _folder_as_before(run.train.save):
        start = setup.find_start(run, grid, device)
    steps = run.train.train_iters - start.state.step
    if steps > 0:
        batches("train", start.state.samples)
    if run.train.eval_interval:
        batches("valid", 0)
    _log_length(run, steps)
    _log_memory(run, devices, device, kernels)
    logger.info(f"dry run: everything was found; on {devices} device{'s' * (devices > 1)} the run can start")


def _check_deepspeed(run: Run, devices: int, device: Device) -> None:
    path = run.parallel.deepspeed_config
    if not path:
        return
    from ascendspeed.training.engines import deepspeed_check
    from ascendspeed.training.engines.deepspeed import import_deepspeed
    from ascendspeed.training.engines.deepspeed_config import ds_config, read_additions

    import_deepspeed(device)
    deepspeed_check.check(ds_config(run, devices), read_additions(path), path)


@contextmanager
def _folder_as_before(folder: str | None) -> Iterator[None]:
    """Removes the folders that a check of --save creates."""
    path = Path(folder).absolute() if folder else None
    missing = [p for p in (path, *path.parents) if not p.exists()] if path else []
    yield
    for created in missing:
        if created.is_dir() and not any(created.iterdir()):
            created.rmdir()


def _log_length(run: Run, steps: int) -> None:
    """Logs the steps and tokens that are left."""
    samples, length = run.train.global_batch_size, run.data.seq_length
    assert samples is not None
    ramp = " at the end" if len(batch_sizes(run.train)) > 1 else ""
    logger.info(
        f"length: {max(0, steps):,} steps of {samples:,} samples{ramp} x {length:,} = "
        f"{samples * length:,} tokens; {max(0, steps) * samples * length:,} tokens in all"
    )


def _log_memory(run: Run, devices: int, device: Device, kernels: KernelChoice) -> None:
    """Logs the planned memory of every rank that differs, or why it is unknown."""
    try:
        command.check_supported(run)
    except UserError as error:
        logger.info(f"memory: not planned: {error}")
        return

    def execute(candidate: Run) -> memory_plan.MemoryPlan:
        return memory_plan.plan_memory(candidate, devices, device, kernels)

    if budget := run.train.auto_recompute_device_size:
        choice = auto_recompute.choose(run, devices, execute)
        logger.info(choice.text(budget))
        run = choice.applied(run)
    plan = execute(run)
    logger.info(f"memory per device in GiB, planned for {kernels} kernels:")
    for line in [*report.memory_table(plan).splitlines(), report.verdict(plan, None)]:
        logger.info(line)
