"""Stops all ranks after the same iteration: on a signal, at a time limit, or after a failed save."""

import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed.distributed.process_groups import ProcessGrid

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals of schedulers, launchers and Ctrl-C."""
TIME, FAILED = 1, 2
"""Reasons other than signals; of several reasons the largest number decides."""
FIRST_SIGNAL = 16
"""Signal n is the reason 16 + n."""


@dataclass(frozen=True)
class StopReason:
    """Reason for which all ranks stop after this iteration."""

    kind: int
    rank: int
    """The highest rank with this reason."""

    @property
    def signal(self) -> signal.Signals | None:
        """The signal; None for another reason."""
        return signal.Signals(self.kind - FIRST_SIGNAL) if self.kind > FIRST_SIGNAL else None

    @property
    def failed(self) -> bool:
        """True if an asynchronous save has failed."""
        return self.kind == FAILED


class StopCoordinator:
    """Lets the ranks agree, once per iteration, whether to stop: an all-reduce of one number over a CPU
    group.

    Inside `with`, signals take effect at the end of the iteration. A second Ctrl-C ends the process at once.
    """

    def __init__(self, grid: ProcessGrid, group: Any, minutes: float | None = None) -> None:
        """`group`: from `process_groups.new_cpu_group`, used by nothing else.

        `minutes`: time limit from now on.
        """
        self._grid, self._group = grid, group
        self._deadline = time.monotonic() + minutes * 60 if minutes else None
        self._signal = 0
        self._earlier_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopCoordinator":
        self._earlier_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._earlier_handlers[number])

    def reason(self, failed: bool = False) -> StopReason | None:
        """The reason of any rank; collective, and equal on every rank.

        `failed`: an asynchronous save of this rank has failed.
        """
        own_kind = 0
        if self._signal:
            own_kind = FIRST_SIGNAL + self._signal
        elif failed:
            own_kind = FAILED
        elif self._is_late():
            own_kind = TIME
        kind, rank = divmod(
            self._all_reduce_max(own_kind * self._grid.world + self._grid.rank), self._grid.world
        )
        return StopReason(kind, rank) if kind else None

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _all_reduce_max(self, number: int) -> int:
        if self._grid.world == 1:
            return number
        largest = torch.tensor(number, dtype=torch.int64, device="cpu")
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)
