"""Profiles a range of iterations with torch.profiler (--profile): a trace for each rank, and a summary."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile, record_function

from ascendspeed.config.schema import Run
from ascendspeed.distributed.device import COLLECTIVE_EVENTS, Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training import profile_summary
from ascendspeed.training.profile_summary import DATA, FOLDER, ITERATION, TraceTimes
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


class StepProfiler:
    """Traces the iterations after --profile-step-start up to --profile-step-end."""

    def __init__(self, run: Run, grid: ProcessGrid, device: Device) -> None:
        """Raises UserError for ranks that do not exist, and for a device without a memory history."""
        train = run.train
        if train.record_memory_history and not device.has_memory_history:
            raise UserError(f"--record-memory-history needs a CUDA device; this run is on {device.kind}")
        ranks = train.profile_ranks or range(grid.world)
        if missing := [rank for rank in ranks if not 0 <= rank < grid.world]:
            raise UserError(f"--profile-ranks {missing[0]}: the ranks are 0 to {grid.world - 1}")
        self._train, self._grid, self._device = train, grid, device
        self._is_traced = grid.rank in ranks
        self._folder = Path(train.log_dir, FOLDER)
        self._steps = range(train.profile_step_start, train.profile_step_end) if train.profile else range(0)
        self._trace: profile | None = None
        self._done: list[int] = []
        if train.profile:
            self._make_folder()
        if train.record_memory_history:
            device.record_memory_history()

    @contextlib.contextmanager
    def iteration(self, step: int) -> Iterator[None]:
        """Surrounds the iteration after `step` completed ones."""
        if step not in self._steps:
            yield
            return
        if self._is_traced and self._trace is None:
            self._trace = profile(activities=self._device.profiler_activities)
            self._trace.start()
        with record_function(ITERATION):
            yield
            if self._trace:
                self._device.synchronize()
        self._done.append(step + 1)

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Surrounds the preparation of the batches of an iteration."""
        with record_function(DATA) if self._trace else contextlib.nullcontext():
            yield

    def finish(self, step: int, is_last: bool) -> None:
        """Writes traces and summary after the last profiled iteration, or the last one of the run.

        Collective, once.
        """
        if is_last and self._train.record_memory_history:
            self._dump_memory_history()
        if is_last and self._steps and not self._done:
            logger.warning(
                f"--profile: nothing was traced, since the run has no iteration between "
                f"--profile-step-start {self._steps.start} and --profile-step-end {self._steps.stop}"
            )
        if not self._done or not (is_last or step >= self._steps.stop):
            return
        iterations = f"{self._done[0]}-{self._done[-1]}"
        self._steps, self._done = range(0), []
        traces = self._grid.all_gather_object(self._write_trace() if self._trace else None)
        self._trace = None
        written = [trace for trace in traces if trace]
        if self._grid.rank == 0 and written:
            times = profile_summary.compare(written)
            with self._surviving("summary"):
                profile_summary.write_summary(self._folder, times, iterations)
            logger.info(profile_summary.as_text(times, iterations))
            logger.info(f"traces for Perfetto and chrome://tracing are in {self._folder}")

    def _make_folder(self) -> None:
        """Makes the folder of the traces. Raises UserError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--profile writes to {self._folder}: {error.strerror}; choose another --log-dir"
            ) from None

    @contextlib.contextmanager
    def _surviving(self, output: str) -> Iterator[None]:
        """Makes an error of writing a warning: a full disk must not end the training."""
        try:
            yield
        except (OSError, RuntimeError, UserError) as error:
            logger.warning(
                f"--profile: rank {self._grid.rank} could not write its {output}: {error}; training goes on"
            )

    def _write_trace(self) -> TraceTimes | None:
        """Writes the trace of this rank; returns its times, None if it cannot be written."""
        self._trace.stop()
        path = self._folder / f"rank-{self._grid.rank:05}.json.gz"
        with self._surviving("trace"):
            self._trace.export_chrome_trace(str(path))
            events = profile_summary.read_events(path)
            return profile_summary.measure(self._grid.rank, events, COLLECTIVE_EVENTS)
        return None

    def _dump_memory_history(self) -> None:
        path, rank = Path(self._train.memory_snapshot_path), self._grid.rank
        if rank:
            path = path.with_name(f"{path.stem}-rank{rank}{path.suffix}")
        self._device.dump_memory_history(str(path))
        logger.info(f"memory history for pytorch.org/memory_viz is in {path}")
