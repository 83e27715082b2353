"""Sums over the conversations of preference pairs, such as the log-probabilities of their answers, and the
report of a loss over pairs."""

import torch
import torch.distributed as dist
from torch import Tensor

from ascendspeed.data.batch import Batch
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.objectives import LossSums

PAIR_METRICS = ("chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy")
"""Fields of `TrainLine` that `pair_report` has behind the loss."""


def answer_logprobs(losses: Tensor, batch: Batch, grid: ProcessGrid) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of the tokens of every answer, and the number of its tokens: [2 pairs].

    Collective over context-parallel ranks, each of which has the gradient of its own positions.
    """
    sums = sums_over_conversations(
        torch.stack((-losses.float() * batch.loss_mask, batch.loss_mask)), batch, grid
    )
    return sums[0], sums[1]


def sums_over_conversations(values: Tensor, batch: Batch, grid: ProcessGrid) -> Tensor:
    """Sums of values [n, b, s] over the positions of every conversation: [n, 2 pairs].

    Collective over context-parallel ranks, each of which has the gradient of its own positions.
    """
    assert batch.conversations is not None
    zeros = values.new_zeros(len(values), 2 * batch.pairs)
    sums = zeros.index_add(1, batch.conversations.flatten(), values.flatten(1))
    if grid.cp > 1:
        everywhere = sums.detach().clone()
        dist.all_reduce(everywhere, group=grid.cp_group)
        sums = sums + (everywhere - sums.detach())
    return sums


def pair_report(loss: Tensor, chosen: Tensor, rejected: Tensor, grid: ProcessGrid) -> LossSums:
    """Sums over pairs [pairs]: the loss, and the rewards of both answers as `PAIR_METRICS`."""
    chosen, rejected = chosen.detach(), rejected.detach()
    rows = (loss.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float())
    # Context-parallel ranks have the sums over whole answers: one of them reports.
    return LossSums(loss.sum(), torch.stack([row.sum() for row in rows]) * (grid.cp_rank == 0))
