"""CUDA graphs: kernels of a function are recorded once and launched together afterwards."""

import weakref
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Replay: TypeAlias = Callable[[], Tensor]
"""Runs the recorded operations on the memory that they were recorded with; returns the same tensor, which
every call overwrites."""
Capture: TypeAlias = Callable[[Callable[[], Tensor]], Replay]
"""Records a function without arguments that was called before. Whatever it takes from Python is recorded as
it is; whatever it reads from tensors is read again by every replay."""


def open_capture() -> Capture:
    """Capture by CUDA graphs. Those that exist share one memory pool, so only one may run at a time."""
    captured: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(function: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in captured), None)  # a pool without graphs cannot be used again
        # thread_local: other threads of the process (a server's) may call the driver meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = function()
        captured.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture
