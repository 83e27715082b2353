"""Fault tolerance of a run: stop signals, heartbeats between ranks, and checks of the loss.

A run ends with exit code 0 (finished, or stopped by --exit-interval or --exit-duration-in-mins), 2 (user
error), 69 (a rank is lost), 75 (saved and stopped after a signal) or 1 (a bug). After 69 and 75,
--auto-resume continues it.
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
    """Context manager of a run: handles stop signals, exchanges heartbeats and monitors the loss."""

    def __init__(self, run: Run, grid: ProcessGrid) -> None:
        """Creates the process groups; collective."""
        minutes = run.train.distributed_timeout_minutes
        self.stop = StopCoordinator(
            grid,
            process_groups.new_cpu_group(minutes) if grid.world > 1 else None,
            run.train.exit_duration_in_mins,
        )
        self.loss_monitor = LossMonitor(run, grid)
        self.reason: StopReason | None = None
        """Cause of a stop before the last iteration."""
        self.started = False
        """True once training has started; earlier failures are not resumable."""
        self.done = False
        """True after the last iteration: there is nothing to continue."""
        self._run = run
        self._contexts = ExitStack()
        self._heartbeat = Heartbeat(grid, minutes, self._log_resume_command)

    def __enter__(self) -> "RunMonitor":
        self._contexts.enter_context(self.stop)
        self._contexts.enter_context(self._heartbeat)
        return self

    def __exit__(self, *error: Any) -> None:
        cause = getattr(error[1], "__cause__", None)
        if not isinstance(cause, OwnershipLost):  # resuming would stop the run that owns the folder now
            self._log_resume_command()
        self._contexts.__exit__(*error)

    def _log_resume_command(self) -> None:
        save = self._run.train.save
        if self.started and not self.done and save and looks_like_checkpoint(save):
            logger.info(f"to continue: {resume_command()}")

    @property
    def exit_code(self) -> int:
        """Exit code of a run that ended without an error."""
        return errors.EXIT_STOPPED if self.reason and self.reason.signal and not self.done else 0


def resume_command() -> str:
    """The command that continues this run."""
    recipe = os.environ.get("RECIPE")  # set by the launcher of the recipes: the command as it was typed
    command = recipe
    if not command:
        launcher = "python" if os.environ.get("WORLD_SIZE", "1") == "1" else "<the same launcher>"
        command = f"{launcher} {shlex.join(sys.argv)}"
    if "--auto-resume" not in command.replace("_", "-"):
        command += " --auto-resume"
    return f"{command}  # with the same variables" if recipe else command
