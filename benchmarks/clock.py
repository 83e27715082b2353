"""Measures wall and CPU time of a call, for benchmarks with both sides in one process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any], wait: Callable[[], None]) -> tuple[Any, Timing]:
    """Returns the result of `run` and its times. `wait` synchronizes the device."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    value = run()
    wait()
    return value, Timing(time.perf_counter() - wall, time.process_time() - cpu)
