"""Process grid (tensor, pipeline, context, expert and data parallel), random states, and DeepSpeed's `mpu`
interface."""

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

SEED_STRIDE = 1_000_003
"""Distance between the seeds of two replicas; larger than the distances between Megatron's own seeds in one
replica."""


@dataclass(frozen=True)
class ProcessGrid:
    """Position of this rank in the process grid."""

    rank: int
    world: int
    tp_rank: int
    tp: int
    dp_rank: int
    """Selects the samples of a global batch."""
    dp: int
    pp_rank: int = 0
    pp: int = 1
    cp_rank: int = 0
    """Selects the chunks of every sequence."""
    cp: int = 1
    ep_rank: int = 0
    """Selects the experts of every layer."""
    ep: int = 1

    def __str__(self) -> str:
        text = f"{self.world} processes: TP {self.tp} x DP {self.dp}"
        for name, size in (("PP", self.pp), ("CP", self.cp)):
            text += f" x {name} {size}" if size > 1 else ""
        return text + (f", EP {self.ep}" if self.ep > 1 else "")

    @property
    def tp_group(self) -> Any:
        """Tensor-parallel process group of this rank."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def dp_group(self) -> Any:
        """Data-parallel process group of this rank, without context-parallel ranks."""
        return parallel_state.get_data_parallel_group()

    @property
    def dp_cp(self) -> int:
        """Ranks that hold a copy of the same weights: data parallel x context parallel."""
        return self.dp * self.cp

    @property
    def cp_group(self) -> Any:
        """Context-parallel process group of this rank."""
        return parallel_state.get_context_parallel_group()

    @property
    def dp_cp_group(self) -> Any:
        """Process group of the ranks that hold a copy of the same weights as this rank."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world > 1:
            dist.barrier()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns every rank's small, picklable value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def initialize(
    device: Device, parallel: ParallelConfig, seed: int, timeout_minutes: float = 30
) -> ProcessGrid:
    """Joins the process group that the launcher describes (RANK, WORLD_SIZE, MASTER_ADDR, ...) and builds the
    grid.

    Seeds every generator too: outside tensor-parallel regions the ranks of a tensor-parallel group share one
    seed, as they must draw equal numbers there; inside them every rank has its own. Existing groups are kept.
    Raises `UserError` if the ranks do not meet.
    """
    single_process = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in single_process.items():
        os.environ.setdefault(name, value)  # `python pretrain_intern.py` without a launcher
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
            num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=False,
        )
    # Ranks of a tensor-parallel group are consecutive.
    replica = dist.get_rank() // parallel_state.get_tensor_model_parallel_world_size()
    torch.manual_seed(seed + SEED_STRIDE * replica)
    model_parallel_cuda_manual_seed(seed + SEED_STRIDE * replica)
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
            f"rank {rank} of {world} did not meet the others at {host}:{port}: {first_line(error)}; "
            "choose another MASTER_PORT if it is taken, or more --distributed-timeout-minutes than "
            f"{timeout_minutes:g} if the start takes long"
        ) from error


def rng_states() -> dict[str, Tensor]:
    """States (uint8) of this rank's random number generators: torch's, the device's, and those of the
    tensor-parallel regions."""
    tracked = {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return {"torch": torch.get_rng_state(), "device": devices.rng_state(), **tracked}


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Restores the states that `rng_states` returned."""
    torch.set_rng_state(states["torch"])
    devices.set_rng_state(states["device"])
    tracked = {
        name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")
    }
    get_cuda_rng_tracker().set_states(tracked)


def new_cpu_group(timeout_minutes: float) -> Any:
    """Creates an additional process group of all ranks on the CPU, for a background thread or for data that
    no device needs."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


@contextmanager
def initialized(device: Device, parallel: ParallelConfig, seed: int) -> Iterator[ProcessGrid]:
    """Context manager around `initialize` that leaves the process groups at the end, unless they existed
    before."""
    existed = dist.is_initialized()
    try:
        yield initialize(device, parallel, seed)
    finally:
        if not existed:
            destroy()


def destroy() -> None:
    """Leaves the process groups."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class MPU:
    """DeepSpeed's `mpu` interface on Megatron's process groups; `parallel_state` itself lacks half of the
    methods."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_group(self) -> Any:
        """The tensor-parallel group; the DeepSpeed engine has no pipeline stages."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_data_parallel_group(self) -> Any:
        """Data-parallel group that includes context-parallel ranks: both average gradients."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """Rank in the data-parallel group."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)
