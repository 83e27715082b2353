"""What a run of one side took, by the wall and by the CPU; for benchmarks that have both sides in one process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Took:
    """One run of one side."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any], wait: Callable[[], None]) -> tuple[Any, Took]:
    """What it gave, and what it took."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    value = run()
    wait()
    return value, Took(time.perf_counter() - wall, time.process_time() - cpu)
