"""Learning-rate schedule as a pure function of the iteration, equal to
`megatron.core.optimizer_param_scheduler`. No torch."""

import math

from ascendspeed.config.schema import OptimConfig
from ascendspeed.utils.errors import UserError


def lr_at(iteration: int, optim: OptimConfig, train_iters: int) -> float:
    """Learning rate of the optimizer step after `iteration` completed steps.

    Skipped steps (overflow, NaN) do not count as completed, as in Megatron's loop. The first step has
    `iteration` 0, which gives learning rate 0 with warmup and the peak without. `check` validates the
    settings.
    """
    warmup, decay = warmup_iters(optim, train_iters), decay_iters(optim, train_iters)
    if warmup > 0 and iteration <= warmup:
        return optim.lr * iteration / warmup
    if optim.lr_decay_style == "constant":
        return optim.lr
    if iteration > decay:
        return optim.min_lr
    progress = (iteration - warmup) / (decay - warmup)
    if optim.lr_decay_style == "linear":
        coefficient = 1.0 - progress
    else:
        coefficient = 0.5 * (math.cos(math.pi * progress) + 1.0)
    return optim.min_lr + coefficient * (optim.lr - optim.min_lr)


def decay_iters(optim: OptimConfig, train_iters: int) -> int:
    """Iterations, including warmup, until the learning rate reaches its minimum."""
    return train_iters if optim.lr_decay_iters is None else optim.lr_decay_iters


def warmup_iters(optim: OptimConfig, train_iters: int) -> float:
    """Iterations of warmup; not rounded if given as a fraction, as in Megatron."""
    if optim.lr_warmup_fraction is None:
        return optim.lr_warmup_iters
    return optim.lr_warmup_fraction * decay_iters(optim, train_iters)


def check(optim: OptimConfig, train_iters: int) -> None:
    """Raises `UserError` for an invalid schedule."""
    decay, warmup = decay_iters(optim, train_iters), warmup_iters(optim, train_iters)
    if train_iters < 1:
        raise UserError(f"--train-iters {train_iters}: must be at least 1")
    if decay < 1:
        raise UserError(f"--lr-decay-iters {decay}: must be at least 1")
    for flag, value in (("lr", optim.lr), ("min-lr", optim.min_lr)):
        if not (0 <= value < math.inf):
            raise UserError(f"--{flag} {value:g}: must be a number that is not negative")
    if optim.lr_decay_style != "constant" and optim.min_lr > optim.lr:
        raise UserError(
            f"--min-lr {optim.min_lr:g} is above --lr {optim.lr:g}; choose a --min-lr of at most that"
        )
    if optim.lr_warmup_fraction is not None and optim.lr_warmup_iters:
        both = (
            f"--lr-warmup-fraction {optim.lr_warmup_fraction:g} and --lr-warmup-iters {optim.lr_warmup_iters}"
        )
        raise UserError(f"{both}: give one of them, not both")
    if optim.lr_warmup_fraction is not None and not (0 <= optim.lr_warmup_fraction < 1):
        raise UserError(f"--lr-warmup-fraction {optim.lr_warmup_fraction:g}: must be at least 0 and below 1")
    if optim.lr_warmup_iters < 0:
        raise UserError(f"--lr-warmup-iters {optim.lr_warmup_iters}: must not be negative")
    if warmup >= decay:
        of = "--train-iters" if optim.lr_decay_iters is None else "--lr-decay-iters"
        raise UserError(
            f"--lr-warmup-iters {warmup:g} must be below {of} {decay}, over which the learning rate decays"
        )
