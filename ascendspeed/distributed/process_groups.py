"""The rank grid: which ranks share a layer, the stack, a sequence and which share the data; and the view that DeepSpeed wants."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch import Tensor

from ascendspeed.config.schema import ParallelConfig
from ascendspeed.distributed import device as devices
from ascendspeed.distributed.device import Device
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

SEEDS = 1_000_003
"""Between the seeds of two replicas; further than Megatron's own seeds of one are apart."""


@dataclass(frozen=True)
class ProcessGrid:
    """This rank's place."""

    rank: int
    world: int
    tp_rank: int
    tp: int
    dp_rank: int
    """Which samples of a global batch are this rank's."""
    dp: int
    pp_rank: int = 0
    pp: int = 1
    cp_rank: int = 0
    """Which part of every sequence is this rank's."""
    cp: int = 1
    ep_rank: int = 0
    """Which experts are this rank's."""
    ep: int = 1

    def __str__(self) -> str:
        more = "".join(f" x {name} {size}" for name, size in (("PP", self.pp), ("CP", self.cp)) if size > 1)
        return f"{self.world} processes: TP {self.tp} x DP {self.dp}{more}" + (
            f", EP {self.ep}" if self.ep > 1 else ""
        )

    @property
    def tp_group(self) -> Any:
        """Process group of the ranks that share this rank's layers."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def dp_group(self) -> Any:
        """Process group of the ranks that differ in their samples alone."""
        return parallel_state.get_data_parallel_group()

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world > 1:
            dist.barrier()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's (small, picklable) value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def initialize(
    device: Device, parallel: ParallelConfig, seed: int, timeout_minutes: float = 30
) -> ProcessGrid:
    """Joins the process group that the launcher describes (RANK, WORLD_SIZE, MASTER_ADDR, ...) and builds the grid.

    Also seeds every generator: outside tensor-parallel regions one seed for the ranks of a tensor-parallel group, as they must draw
    the same there, inside them one of its own for every rank. Groups that were built before stay as they are.
    """
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in alone.items():
        os.environ.setdefault(name, value)  # a plain `python pretrain_intern.py` is a world of one
    if not dist.is_initialized():
        _join(device, timeout_minutes)
    if not parallel_state.model_parallel_is_initialized():
        virtual = parallel.num_virtual_stages_per_pipeline_rank
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            virtual if virtual > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=False,
        )
    replica = (
        dist.get_rank() // parallel_state.get_tensor_model_parallel_world_size()
    )  # ranks of a tensor-parallel group adjoin
    torch.manual_seed(seed + SEEDS * replica)
    model_parallel_cuda_manual_seed(seed + SEEDS * replica)
    return ProcessGrid(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp=parallel_state.get_context_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
    )


def _join(device: Device, timeout_minutes: float) -> None:
    rank, world, host, port = (
        os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    launched = world != "1" or port != "0"
    store = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(device.backend, timeout=timedelta(minutes=timeout_minutes), **store)
    except dist.DistError as error:
        raise UserError(
            f"rank {rank} of {world} did not meet the others at {host}:{port}: {first_line(error)}; choose another "
            f"MASTER_PORT if it is taken, or more --distributed-timeout-minutes than {timeout_minutes:g} if the start takes long"
        ) from error


def rng_states() -> dict[str, Tensor]:
    """State (uint8) of this rank's random number generators: torch's, the device's, and those of the tensor-parallel regions."""
    tracked = {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return {"torch": torch.get_rng_state(), "device": devices.rng_state(), **tracked}


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Sets what `generators` gave."""
    torch.set_rng_state(states["torch"])
    devices.set_rng_state(states["device"])
    tracked = {
        name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")
    }
    get_cuda_rng_tracker().set_states(tracked)


def new_cpu_group(timeout_minutes: float) -> Any:
    """A process group of all ranks beside the others, on the CPU: for a thread of its own, or for what no device needs to know."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


@contextmanager
def initialized(device: Device, parallel: ParallelConfig, seed: int) -> Iterator[ProcessGrid]:
    """`initialize` for the time of a block; groups that were there before stay."""
    before = dist.is_initialized()
    try:
        yield initialize(device, parallel, seed)
    finally:
        if not before:
            destroy()


def destroy() -> None:
    """Leaves the process groups."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class MPU:
    """What DeepSpeed asks of an `mpu`, answered by Megatron's groups; bare `parallel_state` lacks half of it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_group(self) -> Any:
        """The tensor-parallel group: there are no pipeline stages under DeepSpeed."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Ranks in it."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        """This rank in it."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_data_parallel_group(self) -> Any:
        """Context-parallel ranks average gradients like data-parallel ones."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Ranks in it."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """This rank in it."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)
