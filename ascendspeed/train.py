"""The training loop: what it does every iteration, what it says and keeps."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ascendspeed import checkpoint, plan
from ascendspeed.checkpoint import TrainState
from ascendspeed.config import Run
from ascendspeed.data.dataset import Batch
from ascendspeed.device import Device
from ascendspeed.engines import Engine, StepResult
from ascendspeed.errors import UserError
from ascendspeed.log import EvalLine, Logger, TrainLine
from ascendspeed.parallel import Grid
from ascendspeed.schedule import lr_at
from ascendspeed.start import Batches

SMALL_SCALE = 128.0  # a loss scale that is still above it may fall further; overflows there are no failure


@dataclass
class Window:
    """What has happened since the last log line."""

    results: list[StepResult] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def line(self, run: Run, state: TrainState, lr: float, grid: Grid, device: Device) -> TrainLine:
        """The log line, and a new window."""
        results, seconds = self.results, time.perf_counter() - self.began
        counted = [r for r in results if math.isfinite(r.loss)]
        tokens = sum(r.tokens for r in counted)
        per_iteration = seconds / len(results)
        per_device = run.train.global_batch_size * run.data.seq_length / per_iteration / grid.world
        tflops = per_device * plan.flops_per_token(run.model, run.data.seq_length) / 1e12
        peak = plan.known_peak(device.name) if run.optim.dtype != "fp32" else None
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
            loss_scale=results[-1].loss_scale,
            grad_norm=results[-1].grad_norm,
            skipped=sum(r.skipped for r in results),
            nans=len(results) - len(counted),
            memory_gib=device.peak_memory() / 2**30,
            seconds_left=round((run.train.train_iters - state.step) * per_iteration),
        )


def train(run: Run, grid: Grid, device: Device, engine: Engine, batches: Batches, log: Logger, start: TrainState) -> TrainState:
    """Trains from `start` to `--train-iters` (or `--exit-interval`); evaluates and saves on the way and at the end.

    Raises `UserError` after `--max-skipped-steps` skipped iterations in a row.
    """
    state, window, in_a_row, saved = start, Window(), 0, start.step
    if state.step >= run.train.train_iters:
        log.say(f"nothing to do: iteration {state.step} of --train-iters {run.train.train_iters} is done")
    if not run.train.save:
        log.say("note: no --save, so no checkpoint will be kept")
    while state.step < run.train.train_iters:
        lr = lr_at(engine.updates, run.optim, run.train.train_iters)
        result = engine.step(batches("train", state.samples), lr)
        state = replace(
            state,
            step=state.step + 1,
            samples=state.samples + run.train.global_batch_size,
            tokens=state.tokens + run.train.global_batch_size * run.data.seq_length,
        )
        window.results.append(result)
        falling = run.optim.fp16 and result.loss_scale > SMALL_SCALE  # fp16 finds its loss scale by overflowing
        in_a_row = in_a_row + 1 if result.skipped and not falling else 0
        if result.skipped:
            log.say(f" iteration {state.step} skipped: loss {result.loss:.6E}, loss scale {result.loss_scale:g}, not finite")
        if in_a_row >= run.train.max_skipped_steps:
            good = f"the last checkpoint is that of iteration {saved}" if saved else "there is no checkpoint yet"
            raise UserError(
                f"{in_a_row} iterations in a row were skipped (last: {state.step}); {good}; lower --lr or check the data"
            )
        leaving = bool(run.train.exit_interval) and state.step % run.train.exit_interval == 0
        last = leaving or state.step == run.train.train_iters
        if last or state.step % run.train.log_interval == 0:
            log.line(window.line(run, state, lr, grid, device))
        paused = time.perf_counter()
        if run.train.eval_interval and state.step % run.train.eval_interval == 0:
            log.line(evaluate(run, engine, batches, state.step))
        if run.train.save and (last or (run.train.save_interval and state.step % run.train.save_interval == 0)):
            saved = save(run, grid, engine, state, log)
        window.began += time.perf_counter() - paused  # the pause is no part of an iteration's time
        if leaving:
            log.say(f"--exit-interval {run.train.exit_interval}: stops after iteration {state.step}")
            break
    return state


def evaluate(run: Run, engine: Engine, batches: Batches, step: int, split: str = "valid") -> EvalLine:
    """Mean loss over the first `--eval-iters` global batches of a split; the same ones every time."""

    def micro_batches() -> Iterator[Batch]:
        for i in range(run.train.eval_iters):
            yield from batches(split, i * run.train.global_batch_size)

    total, tokens = engine.loss(micro_batches())
    return EvalLine(step, total / max(tokens, 1), {"valid": "validation"}.get(split, split))


def save(run: Run, grid: Grid, engine: Engine, state: TrainState, log: Logger) -> int:
    """Saves a checkpoint, says where and how long it took, and returns its step."""
    began = time.perf_counter()
    state = replace(state, engine=engine.scalars())
    place = grid.rank, grid.world, grid.barrier
    path = checkpoint.save(run.train.save, state, run, engine.fragments(), engine.rng(), *place, keep=run.train.keep)
    log.say(f" saved {path} in {time.perf_counter() - began:.1f} s")
    return state.step
