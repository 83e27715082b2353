"""The training loop: where it starts, what it does every iteration, what it says and keeps."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from ascendspeed import checkpoint, formats, plan, tokenizer
from ascendspeed.checkpoint import Checkpoint, TrainState
from ascendspeed.config import Run
from ascendspeed.data import dataset
from ascendspeed.data.dataset import Batch
from ascendspeed.device import Device
from ascendspeed.engines import Engine, StepResult
from ascendspeed.errors import UserError
from ascendspeed.log import EvalLine, Logger, TrainLine
from ascendspeed.parallel import Grid
from ascendspeed.schedule import lr_at
from ascendspeed.weights import random_tensors

Batches = Callable[[str, int], list[Batch]]
"""(split, consumed samples) -> this rank's micro-batches of the global batch that begins there."""


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    tensors: Iterable[tuple[str, Tensor]] | None
    """Weights to fill the model with; None: `resume` brings them."""
    resume: Checkpoint | None = None

    @property
    def state(self) -> TrainState:
        """Position in the run."""
        return self.resume.state if self.resume else TrainState(step=0, samples=0, tokens=0)


def open_data(run: Run, grid: Grid) -> Batches:
    """The data of the run; tensor-parallel ranks of one replica see the same.

    Raises `UserError` for data or a tokenizer that are not there, or that do not fit the model.
    """
    path, rows = run.data.tokenizer_name_or_path, run.model.vocab_size
    if path and (ids := tokenizer.load(path).vocab_size) > rows:
        raise UserError(f"--tokenizer-name-or-path {path} has {ids} ids, but the model's vocabulary {rows}")
    names = ["train", "valid"] if run.train.eval_interval else ["train"]
    splits = dataset.build_splits(run.data, run.train.seed, run.model.vocab_size, names)
    sizes = run.train.global_batch_size, run.train.micro_batch_size
    return lambda split, consumed: dataset.batch(splits[split], consumed, *sizes, grid.dp_rank, grid.dp)


def find_start(run: Run, grid: Grid, device: Device, say: Callable[[str], None]) -> Start:
    """What `--load` means: a training checkpoint to continue (or, with --finetune, its weights), weights, or nothing yet.

    Raises `UserError` when there is nothing where it points, or when `--save` holds another run that would be overwritten.
    """
    load, save = run.train.load, run.train.save
    if save and save != load and checkpoint.looks_like_checkpoint(save):
        raise UserError(f"--save {save} already holds checkpoints: continue them with --load {save}, or choose another folder")
    found = None
    if load and (checkpoint.looks_like_checkpoint(load) or load == save):
        found = checkpoint.open_checkpoint(load, *_team(grid), say) if checkpoint.looks_like_checkpoint(load) else None
        if found is None:
            say(f"--load {load} is empty: a fresh start from random weights, seed {run.train.seed}")
    elif load:
        source = formats.open_source(load)
        say(f"weights from {load} ({source.kind})")
        return Start(source.tensors())
    else:
        say(f"no --load: random weights, seed {run.train.seed}")
    if found is None:
        return Start(random_tensors(run.model, run.train.seed, device.torch))
    if run.train.finetune:
        say(f"weights from {found.path}; optimizer and position start anew (--finetune)")
        return Start(found.tensors())
    _announce_changes(run, found.run, say)
    say(f"resumes from {found.path}: iteration {found.state.step}, {found.state.samples} samples consumed")
    return Start(None, found)


def _team(grid: Grid) -> tuple[int, int, Callable[[list[str]], list[str]]]:
    return grid.rank, grid.world, lambda mine: [text for texts in grid.gather(mine) for text in texts]


def _announce_changes(run: Run, before: Run, say: Callable[[str], None]) -> None:
    """What changes the curve of a resumed run is said aloud; a new layout is not among it."""
    watched = [("data", n) for n in ("data_path", "split", "seq_length")] + [
        ("train", n) for n in ("seed", "global_batch_size", "train_iters")
    ]
    watched += [
        ("optim", n) for n in ("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "weight_decay", "clip_grad", "bf16", "fp16")
    ]
    for group, name in watched:
        old, new = getattr(getattr(before, group), name), getattr(getattr(run, group), name)
        if old != new:
            say(f"note: {name} was {old} when the checkpoint was saved and is {new} now")


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
        in_a_row = in_a_row + 1 if result.skipped else 0
        if result.skipped:
            log.say(f" iteration {state.step} skipped: loss {result.loss:.6E}, loss scale {result.loss_scale:g}, not finite")
        if in_a_row >= run.train.max_skipped_steps:
            good = f"the last checkpoint is that of iteration {saved}" if saved else "there is no checkpoint yet"
            raise UserError(
                f"{in_a_row} iterations in a row were skipped (last: {state.step}); {good}; lower --lr or check the data"
            )
        if state.step % run.train.log_interval == 0:
            log.line(window.line(run, state, lr, grid, device))
        paused = time.perf_counter()
        if run.train.eval_interval and state.step % run.train.eval_interval == 0:
            log.line(evaluate(run, engine, batches, state.step))
        leaving = bool(run.train.exit_interval) and state.step % run.train.exit_interval == 0
        if run.train.save and (leaving or _time_to_save(run, state.step)):
            saved = save(run, grid, engine, state, log)
        window.began += time.perf_counter() - paused  # the pause is no part of an iteration's time
        if leaving:
            log.say(f"--exit-interval {run.train.exit_interval}: stops after iteration {state.step}")
            break
    return state


def _time_to_save(run: Run, step: int) -> bool:
    return step == run.train.train_iters or (bool(run.train.save_interval) and step % run.train.save_interval == 0)


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
