"""Objectives: the loss of a micro-batch, and what a run counts, behind one interface for both engines.

`language_modelling` is the mean over supervised tokens; `preference` has the losses over pairs of answers,
`reward_modelling` that of a reward model.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ascendspeed.config.schema import Run
from ascendspeed.data.batch import Batch
from ascendspeed.distributed.process_groups import ProcessGrid


class LossSums(NamedTuple):
    """Sums over a micro-batch."""

    total: Tensor
    """Loss to differentiate, a scalar: the gradients of all ranks add up to that of the sum over the
    batch."""
    report: Tensor
    """[1 + metrics], detached: loss and metrics; the reports of all ranks add up to the sums over the
    batch."""


class Scorer(Protocol):
    """Services of an engine that an objective may use before a step."""

    def score(self, batches: Sequence[Batch], adapters: bool = True) -> list[Tensor]:
        """Log-probability [2 pairs] of every answer of each micro-batch under the weights as they are, or as
        they are without adapters. Only ranks of the last pipeline stage return any. No gradients."""

    def sum_over_batch(self, values: Sequence[float]) -> list[float]:
        """Sums numbers of each data-parallel rank over these ranks."""


class Objective(Protocol):
    """Loss of a run: the mean of what `sums` adds up over what `count` counts, in the global batch."""

    metrics: tuple[str, ...]
    """Fields of `TrainLine` that `LossSums.report` has behind the loss."""

    def count(self, batch: Batch) -> float:
        """Number of items that a micro-batch has: supervised tokens, or pairs."""

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """Completes this rank's micro-batches of a global batch, before their first forward pass.
        Collective."""

    def sums(self, losses: Tensor, batch: Batch, grid: ProcessGrid) -> LossSums:
        """Sums over a micro-batch, of which `losses` [b, s] (minus the log-probability of every label, or the
        scores of a reward model) and the tensors of `batch` are the positions of this context-parallel
        rank."""


def create(run: Run) -> Objective:
    """Creates the objective of --stage."""
    if run.preference.trains_reward_model:
        from ascendspeed.training.objectives.reward_modelling import RewardModelling

        return RewardModelling()
    if run.preference.trains_on_pairs:
        from ascendspeed.training.objectives.preference import PreferenceObjective

        return PreferenceObjective(run.preference, has_adapters=run.lora.lora_rank > 0)
    from ascendspeed.training.objectives.language_modelling import LanguageModelling

    return LanguageModelling()
