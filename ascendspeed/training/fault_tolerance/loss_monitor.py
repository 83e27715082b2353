"""Whether training goes well: iterations that were skipped, by whom and on which samples; losses that jump."""

import logging
import math
import statistics
from collections import deque

from ascendspeed.checkpoint.fragment import TrainState
from ascendspeed.config.schema import Run
from ascendspeed.data.dataset import micro_batch_starts
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.engines import StepResult

logger = logging.getLogger(__name__)

SMALL_SCALE = 128.0
"""A loss scale that is still above it may fall further; overflows there are how fp16 finds its scale, and no failure."""
WINDOW = 64
"""Losses that a new one is compared with; the first comparison needs a quarter of them."""
SPIKE = 8.0
"""A spike is this many deviations above the median ..."""
LEAST = 0.01
"""... where a deviation is at least this share of the median, lest a flat curve spike at every ripple."""
NAMED = 8
"""Ranks that a line names; then it says how many more."""


class LossMonitor:
    """Looks at every iteration's result. What it says, it says once, on rank 0."""

    def __init__(self, run: Run, grid: ProcessGrid) -> None:
        self._run, self._grid = run, grid
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._in_spike = False
        self.skipped_in_a_row = 0

    def look(self, before: TrainState, result: StepResult) -> None:
        """At the result of the iteration that began at `before`; the ranks talk to each other when it was skipped."""
        if result.skipped:
            finding = self._run.optim.fp16 and result.loss_scale > SMALL_SCALE
            self.skipped_in_a_row += not finding
            logger.info(
                f" iteration {before.step + 1} skipped, nothing was updated: {self._blame(before, result)}"
            )
            return
        if not math.isfinite(result.loss):
            raise RuntimeError(
                f"iteration {before.step + 1} was not skipped, though its loss is {result.loss}"
            )
        self.skipped_in_a_row = 0
        self._compare(before, result.loss)

    def _blame(self, before: TrainState, result: StepResult) -> str:
        """Ranks and samples, of a skipped iteration: those with a loss that is not finite, or else all of them."""
        size = self._run.train.micro_batch_size
        starts = micro_batch_starts(
            before.samples, self._run.train.global_batch_size, size, self._grid.dp_rank, self._grid.dp
        )
        mine = [f"{starts[i]}-{starts[i] + size - 1}" for i in result.bad]
        guilty = [
            f"rank {rank}: samples {', '.join(bad)}"
            for rank, bad in enumerate(self._grid.all_gather_object(mine))
            if bad
        ]
        scale = f"loss scale {result.loss_scale:g}"
        if not result.tokens:
            last = before.samples + self._run.train.global_batch_size - 1
            return f"no token of samples {before.samples}-{last} is to be learnt"
        if not guilty:
            samples = f"samples {before.samples}-{before.samples + self._run.train.global_batch_size - 1}"
            return (
                f"a gradient is not finite, every loss is ({result.loss:.6E}); all ranks: {samples}; {scale}"
            )
        more = f" and {len(guilty) - NAMED} more ranks" if len(guilty) > NAMED else ""
        return f"loss {result.loss:.6E}; {'; '.join(guilty[:NAMED])}{more}; {scale}"

    def _compare(self, before: TrainState, loss: float) -> None:
        if len(self._losses) >= WINDOW // 4:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(
                abs(one - median) for one in self._losses
            )  # a normal curve's sigma
            height = (loss - median) / max(spread, LEAST * abs(median), math.ulp(1.0))
            if height > SPIKE and not self._in_spike:
                last = before.samples + self._run.train.global_batch_size - 1
                logger.warning(
                    f"iteration {before.step + 1}: the loss {loss:.4f} is a spike, {height:.0f} deviations above the "
                    f"median {median:.4f} of the last {len(self._losses)}; samples {before.samples}-{last}"
                )
            self._in_spike = height > SPIKE
        self._losses.append(loss)
