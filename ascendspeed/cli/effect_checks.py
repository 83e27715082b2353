"""Checks of flags that have no effect without another one: refused if the run would lack what they ask for,
else noted. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ascendspeed.cli.parser import flag_of
from ascendspeed.config.schema import Run
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class Dependence:
    """Flags that have an effect under a condition only."""

    group: str
    """Field of `Run`."""
    names: str
    """Fields of the group, with blanks between them."""
    condition: str
    """The condition in words, after the flag and its value."""
    is_met: Callable[[Run], bool]

    def unmet(self, run: Run, typed: frozenset[str]) -> Iterator[str]:
        """Yields a text for each of the flags that is given, with another value than its default, in vain."""
        if self.is_met(run):
            return
        settings = getattr(run, self.group)
        for name in self.names.split():
            value = getattr(settings, name)
            if name in typed and value != getattr(type(settings)(), name):
                yield f"{flag_of(name)}{_word(value)} {self.condition}"


def _word(value: Any) -> str:
    """The value of a flag, after a blank; empty for a switch."""
    return "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"


def _has_tracker(*names: str) -> Callable[[Run], bool]:
    """True for a run that reports to one of the trackers, wandb among them; --wandb-project asks for it."""
    return lambda run: bool(run.train.wandb_project) or any(name in run.train.report_to for name in names)


REFUSED = (
    Dependence(
        "train", "ema_decay", "keeps an average in checkpoints: add --save", lambda run: bool(run.train.save)
    ),
    Dependence(
        "optim",
        "lr_wsd_decay_style",
        "belongs to --lr-decay-style WSD; add it",
        lambda run: run.optim.lr_decay_style == "WSD",
    ),
    Dependence(
        "model",
        "rope_scaling_factor",
        "belongs to --rope-scaling-type; add it",
        lambda run: run.model.rope_scaling_type != "none",
    ),
    Dependence(
        "model",
        "moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_pre_softmax",
        "belongs to a model with experts, and this one has none; leave it out",
        lambda run: run.model.num_experts is not None,
    ),
)
"""Flags without which the run would be another one than its user means."""
NOTED = (
    Dependence("train", "keep async_save", "has no effect without --save", lambda run: bool(run.train.save)),
    Dependence("train", "finetune", "has no effect without --load", lambda run: bool(run.train.load)),
    Dependence(
        "train",
        "eval_iters",
        "has no effect without --eval-interval",
        lambda run: run.train.eval_interval is not None,
    ),
    Dependence(
        "train",
        "wandb_exp_name",
        "has no effect without --report-to wandb, mlflow, swanlab or trackio",
        _has_tracker("wandb", "mlflow", "swanlab", "trackio"),
    ),
    Dependence(
        "train",
        "wandb_entity wandb_save_dir",
        "has no effect without --report-to wandb",
        _has_tracker("wandb"),
    ),
    Dependence(
        "optim",
        "min_lr",
        "has no effect with --lr-decay-style constant",
        lambda run: run.optim.lr_decay_style != "constant",
    ),
    Dependence(
        "optim",
        "lr_decay_iters lr_decay_samples",
        "has no effect with --lr-decay-style constant and without --lr-warmup-fraction",
        lambda run: run.optim.lr_decay_style != "constant" or run.optim.lr_warmup_fraction is not None,
    ),
)
"""Flags that a recipe may set and that do no harm. Not --initial-loss-scale: published bf16 commands have it,
and it names fp16 in its help."""


def check(run: Run, typed: frozenset[str]) -> list[str]:
    """Returns notes about flags without effect; `typed`: fields that the command line sets.

    Raises UserError for one without which the run would be another one than its user means.
    """
    for dependence in REFUSED:
        for text in dependence.unmet(run, typed):
            raise UserError(text)
    return [text for dependence in NOTED for text in dependence.unmet(run, typed)]
