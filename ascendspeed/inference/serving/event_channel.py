"""Sends the events of rank 0 to every rank before each step."""

from typing import Any

import torch
import torch.distributed as dist

from ascendspeed.distributed import process_groups
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.inference.serving.request import Events

IDLE_SECONDS = 1.0
"""Rank 0 sends empty events at least this often, so that the other ranks' timeout notices a lost rank."""
TIMEOUT_MINUTES = 10


class EventChannel:
    """Broadcasts `Events` from rank 0 over a CPU process group of its own. Collective."""

    def __init__(self, grid: ProcessGrid) -> None:
        self.has_peers = grid.world > 1
        self._group: Any = process_groups.new_cpu_group(TIMEOUT_MINUTES) if self.has_peers else None

    def send(self, events: Events) -> None:
        """Sends events; called on rank 0."""
        if not self.has_peers:
            return
        data = bytearray(events.to_bytes())
        dist.broadcast(torch.tensor([len(data)]), 0, group=self._group)
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0, group=self._group)

    def receive(self) -> Events:
        """Returns the events of rank 0; called on the other ranks."""
        size = torch.zeros(1, dtype=torch.long)
        dist.broadcast(size, 0, group=self._group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._group)
        return Events.from_bytes(data.numpy().tobytes())
