"""The training loop: steps, learning rate, logging, evaluation and checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from ascendspeed.checkpoint.async_saver import CheckpointSaver
from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.fragment import EMA, TrainState
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.ownership import claim_folder
from ascendspeed.config.batch_schedule import batch_size_at, is_skipped
from ascendspeed.config.lr_schedule import Schedule
from ascendspeed.config.schema import Run
from ascendspeed.conversion.convert import write_hf
from ascendspeed.conversion.formats import peft
from ascendspeed.conversion.formats.training_checkpoint.reading import adapter_of, full_weights
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed import process_groups
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models import estimates
from ascendspeed.training.data_setup import BatchFunction
from ascendspeed.training.engines import Engine, StepResult
from ascendspeed.training.fault_tolerance import RunMonitor
from ascendspeed.training.metric_lines import EvalLine, ScoreLine, TrainLine
from ascendspeed.training.metrics_log import MetricsLogger
from ascendspeed.training.profiling import StepProfiler
from ascendspeed.training.setup import Start
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

ScoreTasks = Callable[[Engine, int], list[ScoreLine]]
"""(engine, iteration) -> scores of the live model on --eval-tasks; collective."""
SAVE_MINUTES = 24 * 60
"""Timeout of the barriers of a save."""


@dataclass
class LogInterval:
    """Results since the last log line."""

    results: list[StepResult] = field(default_factory=list)
    samples: int = 0
    """Samples of the iterations that were computed."""
    left_out: int = 0
    """Iterations that a flag skipped."""
    began: float = field(default_factory=time.perf_counter)

    def line(
        self, run: Run, before: TrainState, state: TrainState, lr: float, grid: ProcessGrid, device: Device
    ) -> TrainLine:
        """Makes the log line of the iteration from `before` to `state`, and starts a new interval."""
        results, seconds = self.results, time.perf_counter() - self.began
        counted = [r for r in results if math.isfinite(r.loss)]
        items = sum(r.items for r in counted)

        def mean(values: Callable[[StepResult], float]) -> float:
            return sum(values(r) * r.items for r in counted) / items if items else math.nan

        per_iteration = seconds / max(1, len(results))
        per_device = self.samples * run.data.seq_length / seconds / grid.world
        tflops = per_device * estimates.flops_per_token(run.model, run.data.seq_length, run.lora) / 1e12
        peak = estimates.peak_tflops(device.name) if run.optim.dtype != "fp32" else None
        skipped = sum(r.skipped for r in results) + self.left_out
        interval = len(results) + self.left_out
        self.results, self.samples, self.left_out, self.began = [], 0, 0, time.perf_counter()
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
            global_batch_size=batch_size_at(run.train, before.samples),
            loss=mean(lambda r: r.loss),
            **{
                name: mean(lambda r, n=name: r.metrics[n]) for name in (counted[0].metrics if counted else ())
            },
            aux_loss=_mean([r.aux_loss for r in counted]),
            z_loss=_mean([r.z_loss for r in counted]),
            interval=interval,
            loss_scale=results[-1].loss_scale if results else None,
            grad_norm=results[-1].grad_norm if results else None,
            skipped=skipped,
            nans=len(results) - len(counted),
            memory_gib=device.peak_memory() / 2**30,
            seconds_left=round((run.train.train_iters - state.step) * per_iteration),
        )


def _mean(values: list[float | None]) -> float | None:
    """Mean of the numbers; None if there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def train(
    run: Run,
    grid: ProcessGrid,
    device: Device,
    engine: Engine,
    batches: BatchFunction,
    log: MetricsLogger,
    start: Start,
    monitor: RunMonitor,
    profiler: StepProfiler | None = None,
    score_tasks: ScoreTasks | None = None,
) -> TrainState:
    """Trains from `start` to --train-iters or until `monitor` or --exit-interval stops the run; evaluates and
    saves in between.

    Raises `UserError` after --max-skipped-steps skipped iterations in a row, or if a checkpoint cannot be
    saved.
    """
    settings, schedule = run.train, Schedule.of(run)
    state, interval, saver = start.state, LogInterval(), _saver(run, grid, start)
    if state.step >= settings.train_iters:
        logger.info(f"nothing to do: iteration {state.step} of --train-iters {settings.train_iters} is done")
    monitor.started = True
    if not saver:
        logger.info("note: no --save, so no checkpoint will be kept")
    stop_text = ""
    while state.step < settings.train_iters and not stop_text:
        before, lr = state, schedule.lr(_position(schedule, engine, state))
        if is_skipped(settings, state.step) or state.step in state.left_out:
            state = _leave_out(run, state, interval)
        else:
            with profiler.iteration(state.step) if profiler else nullcontext():
                with profiler.data() if profiler else nullcontext():
                    micro_batches = batches("train", state.samples)
                result = engine.step(micro_batches, lr)
            state = advanced(run, state, result.skipped)
            interval.results.append(result)
            interval.samples += state.samples - before.samples
            is_spike = monitor.loss_monitor.check_step(before, result)
            _check_skipped(run, monitor, state, saver)
            if is_spike and (earlier := _roll_back(run, grid, engine, saver, before)):
                monitor.loss_monitor.forget_spike()
                state = earlier
                continue
            state = replace(state, loss=float(result.loss) if math.isfinite(result.loss) else None)
        stop_text = _stop_text(run, monitor, state, saver)
        is_last = bool(stop_text) or state.step == settings.train_iters
        if is_last or state.step % settings.log_interval == 0:
            log.line(interval.line(run, before, state, lr, grid, device))
        paused = time.perf_counter()
        if profiler:
            profiler.finish(state.step, is_last)
        signalled = monitor.reason and monitor.reason.signal  # a scheduler may not wait for an evaluation
        if settings.eval_interval and state.step % settings.eval_interval == 0 and not signalled:
            log.line(evaluate(run, engine, batches, state.step))
        if score_tasks and state.step % settings.eval_tasks_interval == 0 and not signalled:
            for score in score_tasks(engine, state.step):
                log.line(score)
        if saver:
            _save(run, engine, saver, state, is_last)
        interval.began += time.perf_counter() - paused  # the time of an iteration excludes the pause
    if stop_text:
        logger.info(f"{stop_text}: stopped after iteration {state.step}")
    monitor.done = state.step >= settings.train_iters
    if monitor.done and run.train.ema_decay is not None and saver and saver.last and grid.rank == 0:
        _export_average(Checkpoint(saver.last), Path(settings.save))
    if monitor.done and run.lora.lora_rank and saver and saver.last and grid.rank == 0:
        adapter = Path(settings.save, "adapter")
        peft.replace_with(adapter_of(Checkpoint(saver.last)), adapter)
        logger.info(f" adapters for peft in {adapter}")
    return state


def _position(schedule: Schedule, engine: Engine, state: TrainState) -> int:
    """Completed updates, or their samples, which the schedule counts."""
    return engine.updates if schedule.unit == "iters" else state.samples - state.skipped_samples


def advanced(run: Run, state: TrainState, skipped: bool) -> TrainState:
    """Position after the iteration that begins at `state`."""
    size = batch_size_at(run.train, state.samples)
    return replace(
        state,
        step=state.step + 1,
        samples=state.samples + size,
        tokens=state.tokens + size * run.data.seq_length,
        skipped_samples=state.skipped_samples + (size if skipped else 0),
    )


def _export_average(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the average of --ema-decay as a Hugging Face directory beside the checkpoint."""
    target = folder / f"ema_{checkpoint.state.step:07}"
    if not target.exists():
        write_hf(full_weights(checkpoint, EMA), target)
        logger.info(f" average of the weights in {target}")


def _roll_back(
    run: Run, grid: ProcessGrid, engine: Engine, saver: CheckpointSaver | None, before: TrainState
) -> TrainState | None:
    """Restores the last checkpoint after a loss spike in the iteration that began at `before`.

    Returns its position, from which that iteration is left out; None if the run goes on. Collective.
    """
    limit = run.train.rollback_on_spike
    if not limit:
        return None
    if saver:
        saver.wait()
    if before.rollbacks >= limit or not (saver and saver.last):
        why = (
            f"{limit} of {limit} rollbacks are used up" if before.rollbacks >= limit else "no checkpoint yet"
        )
        logger.warning(f"--rollback-on-spike: {why}; training goes on")
        return None
    checkpoint = Readers.of(grid).open(saver.last)
    engine.restore(checkpoint)
    last = before.samples + batch_size_at(run.train, before.samples) - 1
    logger.warning(
        f"--rollback-on-spike: rollback {before.rollbacks + 1} of {limit} to {saver.last}; iteration "
        f"{before.step + 1}, samples {before.samples}-{last}, will be left out"
    )
    left_out = (*checkpoint.state.left_out, *before.left_out, before.step)
    return replace(checkpoint.state, rollbacks=before.rollbacks + 1, left_out=tuple(dict.fromkeys(left_out)))


def _leave_out(run: Run, state: TrainState, interval: LogInterval) -> TrainState:
    """Passes over an iteration that a flag skips; returns the position after it."""
    after = advanced(run, state, skipped=True)
    interval.left_out += 1
    is_flag = is_skipped(run.train, state.step)
    origin = "--iterations-to-skip or --skip-batches" if is_flag else "--rollback-on-spike"
    logger.info(
        f" iteration {after.step} left out (number {state.step} of {origin}): "
        f"samples {state.samples}-{after.samples - 1}"
    )
    return after


def _save(run: Run, engine: Engine, saver: CheckpointSaver, state: TrainState, is_last: bool) -> None:
    """Saves if a checkpoint is due, waits for the last one, and logs the checkpoints that are complete."""
    interval = run.train.save_interval
    if is_last or (interval and state.step % interval == 0):
        saver.save(replace(state, engine=engine.scalars()), engine.fragments(), engine.rng())
    if is_last:
        saver.wait()
    for saved in saver.take_finished():
        stall = f", of which training stood still for {saved.stall:.1f} s" if run.train.async_save else ""
        logger.info(f" saved {saved.path} in {saved.seconds:.1f} s{stall}")


def _check_skipped(run: Run, monitor: RunMonitor, state: TrainState, saver: CheckpointSaver | None) -> None:
    """Raises `UserError` after --max-skipped-steps skipped iterations in a row."""
    skipped = monitor.loss_monitor.skipped_in_a_row
    if skipped >= run.train.max_skipped_steps:
        raise UserError(
            f"{skipped} iterations in a row were skipped (last: {state.step}); {_last_good(saver)}; "
            "lower --lr or check the data"
        )


def _stop_text(run: Run, monitor: RunMonitor, state: TrainState, saver: CheckpointSaver | None) -> str:
    """Reason for which this iteration is the last one, equal on every rank; empty if it is not.

    Collective.
    """
    reason = monitor.stop.reason(failed=bool(saver) and saver.failed)
    monitor.reason = reason
    if reason and reason.failed:
        saver.wait()  # on the rank that failed this raises the error itself
        raise UserError(f"rank {reason.rank} could not save a checkpoint; {_last_good(saver)}")
    if reason and reason.signal:
        return f"{reason.signal.name} to rank {reason.rank}"
    if reason:
        return f"--exit-duration-in-mins {run.train.exit_duration_in_mins:g}"
    if run.train.exit_interval and state.step % run.train.exit_interval == 0:
        return f"--exit-interval {run.train.exit_interval}"
    return ""


def _saver(run: Run, grid: ProcessGrid, start: Start) -> CheckpointSaver | None:
    """The saver of the run, which now owns --save; collective."""
    if not run.train.save:
        return None
    barrier = grid.barrier
    if grid.world > 1:
        # Its own group, since a thread may use it. The long timeout is for slow disks; heartbeats find dead
        # ranks.
        barrier = partial(dist.barrier, group=process_groups.new_cpu_group(SAVE_MINUTES))
    token = grid.all_gather_object(claim_folder(run.train.save) if grid.rank == 0 else "")[0]
    last = start.resume and start.resume.path
    return CheckpointSaver(start.saved_run(run), grid.rank, grid.world, barrier, last, token)


def _last_good(saver: CheckpointSaver | None) -> str:
    if saver:
        saver.wait()
    if saver and saver.last:
        return f"the last good checkpoint is {saver.last}"
    return "there is no checkpoint yet"


def evaluate(run: Run, engine: Engine, batches: BatchFunction, step: int, split: str = "valid") -> EvalLine:
    """Mean loss over the first --eval-iters global batches of a split, which are the same at every
    evaluation.
    """

    def micro_batches() -> Iterator[Batch]:
        for i in range(run.train.eval_iters):
            yield from batches(split, i * run.train.global_batch_size)

    total, tokens = engine.loss(micro_batches())
    return EvalLine(step, total / tokens if tokens else math.nan, {"valid": "validation"}.get(split, split))
