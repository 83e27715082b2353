"""Batch sizes and skipped iterations of a run, as pure functions of its position. No torch.

--rampup-batch-size equals `megatron.core.num_microbatches_calculator`, --rampup-batch-size-iters the batch
sampler of InternEvo.
"""

import re

from ascendspeed.config.schema import TrainConfig
from ascendspeed.utils.errors import UserError

MAX_STEPS = 10_000
"""Most steps of a ramp."""


def batch_size_at(train: TrainConfig, samples: int) -> int:
    """Global batch size of the iteration that begins after `samples` consumed samples."""
    full = train.global_batch_size or 0
    if train.rampup_batch_size_iters is not None:
        start, increment, iterations = train.rampup_batch_size_iters
        for size in range(start, full, increment):
            samples -= size * iterations
            if samples < 0:
                return size
        return full
    if train.rampup_batch_size is None:
        return full
    start, increment, ramp = train.rampup_batch_size
    if samples > ramp or start == full:
        return full
    return start + int(samples / (ramp / ((full - start) // increment))) * increment


def batch_sizes(train: TrainConfig) -> tuple[int, ...]:
    """All global batch sizes of a run, in their order."""
    full = train.global_batch_size or 0
    ramp = train.rampup_batch_size or train.rampup_batch_size_iters
    if ramp is None:
        return (full,)
    start, increment, _ = ramp
    return tuple(range(start, full + 1, increment))


def iterations_of(train: TrainConfig, samples: int) -> int:
    """Iterations of a run of so many samples; a last batch that would be incomplete is left out."""
    if train.rampup_batch_size_iters is not None:
        return _iterations_of_equal_steps(train, samples)
    if train.rampup_batch_size is None:
        return samples // (train.global_batch_size or 1)
    start, increment, ramp = train.rampup_batch_size
    limit, size_lasts = (
        min(ramp, samples),
        ramp / max(1, ((train.global_batch_size or 0) - start) // increment),
    )
    iterations = consumed = 0
    while consumed <= limit:
        size = batch_size_at(train, consumed)
        size_ends = min(limit, (int(consumed / size_lasts) + 1) * size_lasts)
        batches = max(1, int(size_ends - consumed) // size - 1)  # the last ones of a size one by one
        consumed += batches * size
        iterations += batches
    return iterations + max(0, samples - consumed) // (train.global_batch_size or 1)


def _iterations_of_equal_steps(train: TrainConfig, samples: int) -> int:
    """Iterations of so many samples with --rampup-batch-size-iters."""
    assert train.rampup_batch_size_iters is not None
    start, increment, step = train.rampup_batch_size_iters
    full = train.global_batch_size or 1
    iterations = 0
    for size in range(start, full, increment):
        count = min(step, samples // size)
        iterations += count
        samples -= count * size
        if count < step:
            return iterations
    return iterations + samples // full


def check_rampup(train: TrainConfig) -> None:
    """Raises `UserError` for a ramp that does not lead to --global-batch-size."""
    ramp = train.rampup_batch_size or train.rampup_batch_size_iters
    if ramp is None:
        return
    by_samples = train.rampup_batch_size is not None
    start, increment, length = ramp
    full = train.global_batch_size or 0
    flag = f"--rampup-batch-size{'' if by_samples else '-iters'} {start} {increment} {length}"
    if by_samples and train.rampup_batch_size_iters is not None:
        raise UserError(f"{flag} and --rampup-batch-size-iters: give one of them")
    if by_samples and train.train_samples is None:
        raise UserError(f"{flag} needs the length of the run in samples: --train-samples")
    if train.train_epochs is not None:
        raise UserError(f"{flag} does not go with --train-epochs; give --train-iters or --train-samples")
    if min(ramp) < 1:
        unit = "SAMPLES" if by_samples else "ITERATIONS"
        raise UserError(f"{flag}: START, INCREMENT and {unit} must be at least 1")
    if start > full or (full - start) % increment:
        raise UserError(
            f"{flag}: steps of {increment} do not lead from {start} to --global-batch-size {full}; choose an "
            f"INCREMENT that divides {full - start}"
            if start <= full
            else f"{flag}: START is above --global-batch-size {full}"
        )

    if (full - start) // increment > MAX_STEPS:
        raise UserError(f"{flag}: more than {MAX_STEPS:,} batch sizes; choose a larger INCREMENT")


def skipped_iterations(train: TrainConfig) -> list[range]:
    """Iterations that --iterations-to-skip and --skip-batches name, counted from 0.

    Raises `UserError` for a malformed list.
    """
    ranges = [range(number, number + 1) for number in train.iterations_to_skip]
    for word in filter(None, (part.strip() for part in (train.skip_batches or "").split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--skip-batches {train.skip_batches}: {word!r} is not N or FIRST-LAST: 3,7-9")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    if negative := [number for number in train.iterations_to_skip if number < 0]:
        raise UserError(f"--iterations-to-skip {negative[0]}: must be 0 or more")
    return ranges


def is_skipped(train: TrainConfig, iteration: int) -> bool:
    """True if the flags skip the iteration that begins after `iteration` finished ones."""
    return any(iteration in numbers for numbers in skipped_iterations(train))
