"""Alpha-beta model of collectives: a latency for each step, and bytes over the slowest link. No torch."""

import math
from dataclasses import dataclass

from ascendspeed.planning.device_table import LATENCY, NODE, DeviceRates


@dataclass(frozen=True)
class Group:
    """Process group of equally spaced ranks."""

    size: int
    stride: int
    """Distance between neighbours: the product of the sizes of the inner groups."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks of the group in one node."""
        return max(1, min(self.size, NODE // self.stride))

    def bandwidth(self, device: DeviceRates) -> float:
        """Bytes per second and direction of a ring through all ranks.

        Between nodes, as many adapters work as the group has ranks in a node.
        """
        if self.size <= self.ranks_per_node:
            return device.link_gb_s * 1e9
        return min(device.link_gb_s, self.ranks_per_node * device.network_gb_s) * 1e9


def gather_seconds(bytes_: float, group: Group, device: DeviceRates) -> float:
    """All-gather or reduce-scatter of `bytes_`, the size of the whole."""
    if group.size == 1:
        return 0.0
    return bytes_ * (1 - 1 / group.size) / group.bandwidth(device) + _latency(group)


def reduce_seconds(bytes_: float, group: Group, device: DeviceRates) -> float:
    """All-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather_seconds(bytes_, group, device)


def send_seconds(bytes_: float, group: Group, device: DeviceRates) -> float:
    """Message to a neighbour."""
    if group.size == 1:
        return 0.0
    rate = device.link_gb_s if group.ranks_per_node > 1 else device.network_gb_s
    return bytes_ / (rate * 1e9) + LATENCY


def _latency(group: Group) -> float:
    """Steps of a tree; libraries choose it where a ring would be slower."""
    return math.ceil(math.log2(group.size)) * LATENCY
