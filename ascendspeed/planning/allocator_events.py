"""Peak memory by torch's own account: the events of its CPU allocator, for checks of the planner."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"
"""Name of the allocator's events."""


@dataclass
class AllocatorPeak:
    """Bytes above those at the beginning."""

    peak: int = 0
    live: int = 0
    """Bytes at the end."""


@contextlib.contextmanager
def allocator_peak() -> Iterator[AllocatorPeak]:
    """Records every allocation of the CPU meanwhile; the result is valid afterwards."""
    result = AllocatorPeak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == MEMORY]
    for event in sorted(events, key=lambda event: event.start_ns()):
        result.live += event.nbytes()
        result.peak = max(result.peak, result.live)
