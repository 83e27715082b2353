"""Monitors training: reports skipped iterations, with ranks and samples, and loss spikes."""

import logging
import math
import statistics
from collections import deque

from ascendspeed.checkpoint.fragment import TrainState
from ascendspeed.config.batch_schedule import batch_size_at
from ascendspeed.config.schema import Run
from ascendspeed.data.dataset import micro_batch_starts
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.engines import StepResult

logger = logging.getLogger(__name__)

SMALL_SCALE = 128.0
"""While the loss scale is larger, overflows are not failures: fp16 finds its scale by them."""
WINDOW = 64
"""Number of losses that a new one is compared with; the first comparison needs a quarter of them."""
SPIKE = 8.0
"""Deviations above the median from which a loss is a spike."""
LEAST = 0.01
"""Smallest deviation, as a fraction of the median: else a flat curve would have spikes at every ripple."""
NAMED = 8
"""Ranks that a line names; for others it gives the number."""


class LossMonitor:
    """Checks the result of every iteration and logs what is wrong."""

    def __init__(self, run: Run, grid: ProcessGrid) -> None:
        self._run, self._grid = run, grid
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._in_spike = False
        self.skipped_in_a_row = 0

    def check_step(self, before: TrainState, result: StepResult) -> bool:
        """Checks the result of the iteration that began at `before`; collective if it was skipped.

        True if a loss spike begins.
        """
        if result.skipped:
            finds_scale = self._run.optim.fp16 and result.loss_scale > SMALL_SCALE
            self.skipped_in_a_row += not finds_scale
            cause = self._cause_of_skip(before, result)
            logger.info(f" iteration {before.step + 1} skipped, nothing was updated: {cause}")
            return False
        if not math.isfinite(result.loss):
            raise RuntimeError(
                f"iteration {before.step + 1} was not skipped, though its loss is {result.loss}"
            )
        self.skipped_in_a_row = 0
        return self._check_spike(before, result.loss)

    def forget_spike(self) -> None:
        """Takes back the last loss: the run goes back to before it."""
        self._in_spike = False
        self._losses.pop()

    def _batch_size(self, before: TrainState) -> int:
        return batch_size_at(self._run.train, before.samples)

    def _cause_of_skip(self, before: TrainState, result: StepResult) -> str:
        """Describes a skipped iteration: ranks and samples with a non-finite loss, or all samples if every
        loss is finite.
        """
        bad_samples = self._bad_samples_by_rank(before, result)
        scale = f"loss scale {result.loss_scale:g}"
        samples = f"samples {before.samples}-{before.samples + self._batch_size(before) - 1}"
        if not result.items:
            return f"{samples} have no supervised token"
        if not bad_samples:
            return (
                f"a gradient is not finite, every loss is ({result.loss:.6E}); all ranks: {samples}; {scale}"
            )
        more = f" and {len(bad_samples) - NAMED} more ranks" if len(bad_samples) > NAMED else ""
        return f"loss {result.loss:.6E}; {'; '.join(bad_samples[:NAMED])}{more}; {scale}"

    def _bad_samples_by_rank(self, before: TrainState, result: StepResult) -> list[str]:
        """`rank 1: samples 8-9` for every rank with a non-finite loss; collective."""
        size = self._run.train.micro_batch_size
        starts = micro_batch_starts(
            before.samples, self._batch_size(before), size, self._grid.dp_rank, self._grid.dp
        )
        ranges = [f"{starts[i]}-{starts[i] + size - 1}" for i in result.bad]
        return [
            f"rank {rank}: samples {', '.join(bad)}"
            for rank, bad in enumerate(self._grid.all_gather_object(ranges))
            if bad
        ]

    def _check_spike(self, before: TrainState, loss: float) -> bool:
        """Warns once of losses far above the median of the window, until one is normal again; true if it
        warned."""
        begins = False
        if len(self._losses) >= WINDOW // 4:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(earlier - median) for earlier in self._losses)
            sigma = 1.4826 * deviation  # of a normal distribution with this median deviation
            height = (loss - median) / max(sigma, LEAST * abs(median), math.ulp(1.0))
            begins = height > SPIKE and not self._in_spike
            if begins:
                last = before.samples + self._batch_size(before) - 1
                logger.warning(
                    f"iteration {before.step + 1}: the loss {loss:.4f} is a spike, {height:.0f} deviations "
                    "above the "
                    f"median {median:.4f} of the last {len(self._losses)}; samples {before.samples}-{last}"
                )
            self._in_spike = height > SPIKE
        self._losses.append(loss)
        return begins
