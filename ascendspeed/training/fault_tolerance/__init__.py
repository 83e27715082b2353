"""What watches over training: whether to stop, whether all ranks are alive, whether the numbers are sane.

A run ends with exit code 0 (done, or stopped as --exit-interval or --exit-duration-in-mins said), 2 (the user's error), 69 (a rank
is lost), 75 (a signal asked: saved and stopped) or 1 (a mistake in the program). After 69 and 75, --auto-resume continues it.
"""

import logging
import os
import shlex
import sys
from contextlib import ExitStack
from typing import Any

from ascendspeed.checkpoint.ownership import OwnershipLost
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.config.schema import Run
from ascendspeed.distributed import process_groups
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.fault_tolerance.heartbeat import Heartbeat
from ascendspeed.training.fault_tolerance.loss_monitor import LossMonitor
from ascendspeed.training.fault_tolerance.stop_signals import StopCoordinator, StopReason
from ascendspeed.utils import errors

logger = logging.getLogger(__name__)

__all__ = ["Heartbeat", "LossMonitor", "RunMonitor", "StopCoordinator", "StopReason"]


class RunMonitor:
    """Signals, heartbeats and health of one run, inside `with`."""

    def __init__(self, run: Run, grid: ProcessGrid) -> None:
        """Collective."""
        minutes = run.train.distributed_timeout_minutes
        self.stop = StopCoordinator(
            grid,
            process_groups.new_cpu_group(minutes) if grid.world > 1 else None,
            run.train.exit_duration_in_mins,
        )
        self.health = LossMonitor(run, grid)
        self.reason: StopReason | None = None
        """Why training stopped before its end, if it did."""
        self.begun = False
        """Training has: what ended before is not mended by going on."""
        self.done = False
        """The last iteration is over: there is nothing to continue."""
        self._run, self._inside = run, ExitStack()
        self._heartbeat = Heartbeat(grid, minutes, self._farewell)

    def __enter__(self) -> "RunMonitor":
        self._inside.enter_context(self.stop)
        self._inside.enter_context(self._heartbeat)
        return self

    def __exit__(self, *error: Any) -> None:
        if not isinstance(
            getattr(error[1], "__cause__", None), OwnershipLost
        ):  # going on here would stop the other run
            self._farewell()
        self._inside.__exit__(*error)

    def _farewell(self) -> None:
        if (
            self.begun
            and not self.done
            and self._run.train.save
            and looks_like_checkpoint(self._run.train.save)
        ):
            logger.info(f"to continue: {resume_command()}")

    @property
    def exit_code(self) -> int:
        """Of a run that ended without an error."""
        return errors.EXIT_STOPPED if self.reason and self.reason.signal and not self.done else 0


def resume_command() -> str:
    """The command that goes on where this run stopped."""
    typed = os.environ.get("RECIPE")  # the shell launcher's: what was typed, flags included
    if not typed:
        launcher = "python" if os.environ.get("WORLD_SIZE", "1") == "1" else "<the same launcher>"
        typed = f"{launcher} {shlex.join(sys.argv)}"
    words = typed if "--auto-resume" in typed.replace("_", "-") else f"{typed} --auto-resume"
    return f"{words}  # with the same variables" if os.environ.get("RECIPE") else words
