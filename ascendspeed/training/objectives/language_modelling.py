"""Next-token prediction: the mean over the supervised tokens of the global batch."""

from collections.abc import Sequence

from torch import Tensor

from ascendspeed.data.batch import Batch
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.objectives import LossSums, Scorer


class LanguageModelling:
    """Implements `objectives.Objective` for pre-training and supervised fine-tuning."""

    metrics = ()

    def count(self, batch: Batch) -> float:
        """Supervised tokens of a micro-batch."""
        return float(batch.loss_mask.sum())

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """Returns the micro-batches as they are."""
        return list(batches)

    def sums(self, losses: Tensor, batch: Batch, grid: ProcessGrid) -> LossSums:
        """Sum of the losses of the supervised tokens of this rank."""
        total = (losses.float() * batch.loss_mask).sum()
        return LossSums(total, total.detach().view(1))
