"""The training loop: what it does every iteration, what it says and keeps."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from ascendspeed.checkpoint.async_saver import CheckpointSaver
from ascendspeed.checkpoint.fragment import TrainState
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.ownership import claim_folder
from ascendspeed.config.lr_schedule import lr_at
from ascendspeed.config.schema import Run
from ascendspeed.conversion.formats import peft
from ascendspeed.conversion.formats.training_checkpoint.reading import adapter_of
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed import process_groups
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models import estimates
from ascendspeed.training.data_setup import BatchFunction
from ascendspeed.training.engines import Engine, StepResult
from ascendspeed.training.fault_tolerance import RunMonitor
from ascendspeed.training.metrics_log import EvalLine, MetricsLogger, TrainLine
from ascendspeed.training.setup import Start
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

SAVE_MINUTES = 24 * 60
"""What the ranks wait for each other while saving."""


@dataclass
class LogInterval:
    """What has happened since the last log line."""

    results: list[StepResult] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def line(self, run: Run, state: TrainState, lr: float, grid: ProcessGrid, device: Device) -> TrainLine:
        """The log line, and a new window."""
        results, seconds = self.results, time.perf_counter() - self.began
        counted = [r for r in results if math.isfinite(r.loss)]
        tokens = sum(r.tokens for r in counted)
        per_iteration = seconds / len(results)
        per_device = run.train.global_batch_size * run.data.seq_length / per_iteration / grid.world
        tflops = per_device * estimates.flops_per_token(run.model, run.data.seq_length, run.lora) / 1e12
        peak = estimates.peak_tflops(device.name) if run.optim.dtype != "fp32" else None
        self.results, self.began = [], time.perf_counter()
        return TrainLine(
            time=time.strftime("%Y-%m-%d %H:%M:%S"),
            iteration=state.step,
            train_iters=run.train.train_iters,
            samples=state.samples,
            tokens=state.tokens,
            ms_per_iteration=per_iteration * 1e3,
            tokens_per_s=per_device,
            tflops=tflops,
            mfu=tflops / peak if peak else None,
            lr=lr,
            global_batch_size=run.train.global_batch_size,
            loss=sum(r.loss * r.tokens for r in counted) / tokens if tokens else math.nan,
            interval=len(results),
            loss_scale=results[-1].loss_scale,
            grad_norm=results[-1].grad_norm,
            skipped=sum(r.skipped for r in results),
            nans=len(results) - len(counted),
            memory_gib=device.peak_memory() / 2**30,
            seconds_left=round((run.train.train_iters - state.step) * per_iteration),
        )


def train(
    run: Run,
    grid: ProcessGrid,
    device: Device,
    engine: Engine,
    batches: BatchFunction,
    log: MetricsLogger,
    start: Start,
    watch: RunMonitor,
) -> TrainState:
    """Trains from `start` to `--train-iters`, or to where `watch` or `--exit-interval` stop it; evaluates and saves on the way.

    Raises `UserError` after `--max-skipped-steps` skipped iterations in a row, and when a checkpoint cannot be saved.
    """
    state, window, saver = start.state, LogInterval(), _saver(run, grid, start)
    if state.step >= run.train.train_iters:
        logger.info(f"nothing to do: iteration {state.step} of --train-iters {run.train.train_iters} is done")
    watch.begun = True
    if not saver:
        logger.info("note: no --save, so no checkpoint will be kept")
    leaving = ""
    while state.step < run.train.train_iters and not leaving:
        before, lr = state, lr_at(engine.updates, run.optim, run.train.train_iters)
        result = engine.step(batches("train", state.samples), lr)
        state = replace(
            state,
            step=state.step + 1,
            samples=state.samples + run.train.global_batch_size,
            tokens=state.tokens + run.train.global_batch_size * run.data.seq_length,
        )
        window.results.append(result)
        watch.health.look(before, result)
        if watch.health.skipped_in_a_row >= run.train.max_skipped_steps:
            raise UserError(_give_up(watch.health.skipped_in_a_row, state.step, saver))
        leaving = _leaving(run, watch, state, saver)
        last = bool(leaving) or state.step == run.train.train_iters
        if last or state.step % run.train.log_interval == 0:
            log.line(window.line(run, state, lr, grid, device))
        paused = time.perf_counter()
        hurried = watch.reason and watch.reason.signal  # who sent it may not wait for an evaluation
        if run.train.eval_interval and state.step % run.train.eval_interval == 0 and not hurried:
            log.line(evaluate(run, engine, batches, state.step))
        if saver and (last or (run.train.save_interval and state.step % run.train.save_interval == 0)):
            saver.save(replace(state, engine=engine.scalars()), engine.fragments(), engine.rng())
        if saver and last:
            saver.wait()
        for saved in saver.take_finished() if saver else ():
            behind = (
                f", of which training stood still for {saved.stall:.1f} s" if run.train.async_save else ""
            )
            logger.info(f" saved {saved.path} in {saved.seconds:.1f} s{behind}")
        window.began += time.perf_counter() - paused  # the pause is no part of an iteration's time
    if leaving:
        logger.info(f"{leaving}: stopped after iteration {state.step}")
    watch.done = state.step >= run.train.train_iters
    if watch.done and run.lora.lora_rank and saver and saver.last and grid.rank == 0:
        adapter = Path(run.train.save, "adapter")
        peft.replace_with(adapter_of(Checkpoint(saver.last)), adapter)
        logger.info(f" adapters for peft in {adapter}")
    return state


def _leaving(run: Run, watch: RunMonitor, state: TrainState, saver: CheckpointSaver | None) -> str:
    """Why this iteration is the last one here, the same on every rank; empty: it is not."""
    watch.reason = watch.stop.reason(failed=bool(saver) and saver.failed)
    if watch.reason and watch.reason.failed:
        saver.wait()  # raises what its thread met, where that was this rank
        raise UserError(f"rank {watch.reason.rank} could not save a checkpoint; {_last_good(saver)}")
    if watch.reason and watch.reason.signal:
        return f"{watch.reason.signal.name} to rank {watch.reason.rank}"
    if watch.reason:
        return f"--exit-duration-in-mins {run.train.exit_duration_in_mins:g}"
    if run.train.exit_interval and state.step % run.train.exit_interval == 0:
        return f"--exit-interval {run.train.exit_interval}"
    return ""


def _saver(run: Run, grid: ProcessGrid, start: Start) -> CheckpointSaver | None:
    if not run.train.save:
        return None
    barrier = grid.barrier
    if (
        grid.world > 1
    ):  # a group of its own, as it may be used from a thread; a disk may be slow, and the dead are known otherwise
        barrier = partial(dist.barrier, group=process_groups.new_cpu_group(SAVE_MINUTES))
    token = grid.all_gather_object(claim_folder(run.train.save) if grid.rank == 0 else "")[0]
    return CheckpointSaver(
        start.saved_run(run), grid.rank, grid.world, barrier, start.resume and start.resume.path, token
    )


def _give_up(skipped: int, step: int, saver: CheckpointSaver | None) -> str:
    return f"{skipped} iterations in a row were skipped (last: {step}); {_last_good(saver)}; lower --lr or check the data"


def _last_good(saver: CheckpointSaver | None) -> str:
    if saver:
        saver.wait()
    return (
        f"the last good checkpoint is {saver.last}" if saver and saver.last else "there is no checkpoint yet"
    )


def evaluate(run: Run, engine: Engine, batches: BatchFunction, step: int, split: str = "valid") -> EvalLine:
    """Mean loss over the first `--eval-iters` global batches of a split; the same ones every time."""

    def micro_batches() -> Iterator[Batch]:
        for i in range(run.train.eval_iters):
            yield from batches(split, i * run.train.global_batch_size)

    total, tokens = engine.loss(micro_batches())
    return EvalLine(step, total / tokens if tokens else math.nan, {"valid": "validation"}.get(split, split))
