"""When to stop before the last iteration: a signal to any one rank, the clock, or a save that failed behind the step."""

import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed.distributed.process_groups import ProcessGrid

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What a scheduler, a launcher and Ctrl-C send."""
TIME, FAILED = 1, 2  # reasons that are no signals; of several the greatest counts
FIRST_SIGNAL = 16  # signal n is the reason 16 + n


@dataclass(frozen=True)
class StopReason:
    """Why all ranks stop after this iteration."""

    kind: int
    rank: int
    """The (highest) rank that had this reason."""

    @property
    def signal(self) -> signal.Signals | None:
        """The signal, if it was one."""
        return signal.Signals(self.kind - FIRST_SIGNAL) if self.kind > FIRST_SIGNAL else None

    @property
    def failed(self) -> bool:
        """A save behind the step has failed."""
        return self.kind == FAILED


class StopCoordinator:
    """Asks every rank, once per iteration, whether to stop: one number over a group on the CPU.

    Inside `with`, the signals no longer end the process but wait for the end of the iteration. A second Ctrl-C does end it.
    """

    def __init__(self, grid: ProcessGrid, group: Any, minutes: float | None = None) -> None:
        """`group`: `parallel.beside`, used by nothing else; `minutes` from now on until the clock is a reason."""
        self._grid, self._group = grid, group
        self._deadline = time.monotonic() + minutes * 60 if minutes else None
        self._signal, self._before = 0, {}

    def __enter__(self) -> "StopCoordinator":
        self._before = {number: signal.signal(number, self._caught) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def reason(self, failed: bool = False) -> StopReason | None:
        """What any rank has to say; the same on every rank, so all must call it. `failed`: a save of this rank did."""
        mine = (
            FIRST_SIGNAL + self._signal if self._signal else FAILED if failed else TIME if self._late() else 0
        )
        found = self._greatest(mine * self._grid.world + self._grid.rank)
        kind, rank = divmod(found, self._grid.world)
        return StopReason(kind, rank) if kind else None

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _greatest(self, number: int) -> int:
        if self._grid.world == 1:
            return number
        everyone = torch.tensor(number, dtype=torch.int64, device="cpu")
        dist.all_reduce(everyone, dist.ReduceOp.MAX, group=self._group)
        return int(everyone)
