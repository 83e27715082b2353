"""Collectives of the stand-in: gloo that refuses what HCCL's process group refuses before Ascend 950."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from torch_npu import CALLS

REDUCED = {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32}
"""Types of `checkSupportedDataType`; all-gather and broadcast take every type."""
CAST = {torch.uint8, torch.bool}
"""Types that all-reduce casts to int32 first."""
REDUCING = ("allreduce", "allreduce_coalesced", "reduce", "reduce_scatter", "_reduce_scatter_base")
OTHERS = ("broadcast", "allgather", "_allgather_base", "alltoall", "alltoall_base", "send", "recv")
_on_host: set[int] = set()
"""Groups that were made for the CPU, which HCCL never sees."""


def install() -> None:
    """Replaces the methods of process groups, and the names of backends."""
    for name in REDUCING + OTHERS:
        setattr(dist.ProcessGroup, name, _checked(name, getattr(dist.ProcessGroup, name)))
    make, init = dist.new_group, dist.init_process_group

    def new_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        group = make(*args, backend=None if backend in ("hccl", "nccl") else backend, **kwargs)
        if backend == "gloo":
            _on_host.add(id(group))
        return group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return init("gloo" if backend in ("hccl", "nccl") else backend, *args, **kwargs)

    dist.new_group, dist.init_process_group = new_group, init_process_group
    dist.distributed_c10d.new_group = new_group
    dist.distributed_c10d.init_process_group = init_process_group


def _checked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        first = tensors
        while isinstance(first, (list, tuple)):
            first = first[0]
        if id(self) not in _on_host:
            CALLS[f"hccl.{name} {str(first.dtype).removeprefix('torch.')}"] += 1
            allowed = REDUCED | (CAST if name == "allreduce" else set())
            if name in REDUCING and first.dtype not in allowed:
                raise RuntimeError(f"HCCL {name}: Unsupported data type {first.dtype}")
        return method(self, tensors, *args, **kwargs)

    return call
