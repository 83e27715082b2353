"""Log-probabilities of the answers of preference pairs, from the losses of tokens."""

import torch
import torch.distributed as dist
from torch import Tensor

from ascendspeed.data.batch import Batch
from ascendspeed.distributed.process_groups import ProcessGrid


def answer_logprobs(losses: Tensor, batch: Batch, grid: ProcessGrid) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of the tokens of every answer, and the number of its tokens: [2 pairs].

    Collective over context-parallel ranks, each of which has the gradient of its own positions.
    """
    assert batch.conversations is not None
    masked = torch.stack((-losses.float() * batch.loss_mask, batch.loss_mask)).flatten(1)
    zeros = masked.new_zeros(2, 2 * batch.pairs)
    sums = zeros.index_add(1, batch.conversations.flatten(), masked)
    if grid.cp > 1:
        everywhere = sums.detach().clone()
        dist.all_reduce(everywhere, group=grid.cp_group)
        sums = sums + (everywhere - sums.detach())
    return sums[0], sums[1]
