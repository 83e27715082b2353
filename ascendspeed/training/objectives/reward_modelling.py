"""Loss of a reward model: -log sigmoid of the difference of the scores of a chosen and a rejected answer, the
mean over the pairs of the global batch (arXiv 2203.02155, without its division by the answers of a prompt).

The score of a conversation is the output of the scalar head at its last token.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import logsigmoid

from ascendspeed.data.batch import Batch
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.objectives import LossSums, Scorer
from ascendspeed.training.objectives.answers import PAIR_METRICS, pair_report, sums_over_conversations


class RewardModelling:
    """Implements `objectives.Objective` for --stage rm."""

    metrics = PAIR_METRICS

    def count(self, batch: Batch) -> float:
        """Pairs of a micro-batch."""
        return float(batch.pairs)

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """Puts the marks of the last tokens in the place of the labels, which the loss does not use."""
        return [replace(batch, labels=last_tokens(batch)) for batch in batches]

    def sums(self, losses: Tensor, batch: Batch, grid: ProcessGrid) -> LossSums:
        """Sums over the pairs of a micro-batch; `losses` are the scores of all positions."""
        (scores,) = sums_over_conversations((losses.float() * batch.labels)[None], batch, grid)
        chosen, rejected = scores[::2], scores[1::2]
        return pair_report(-logsigmoid(chosen - rejected), chosen, rejected, grid)


def last_tokens(batch: Batch) -> Tensor:
    """Marks [b, s], int64: 1 at the last token of every conversation, else 0.

    A row is divided by its position ids; its unused end has the number of its first conversation.
    """
    assert batch.conversations is not None
    starts = (batch.position_ids == 0).long()
    ends = starts.roll(-1, 1)
    ends[:, -1] = 1
    in_first = starts.cumsum(1) == 1
    is_used = in_first | (batch.conversations != batch.conversations[:, :1])
    return ends * is_used
