"""Memory of a run on every rank that differs: first, middle and last pipeline stage."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ascendspeed.config.schema import ParallelConfig, Run
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.planning import accelerator_kernels, fake_step
from ascendspeed.planning.allocations import DEVICE_BLOCK
from ascendspeed.planning.fake_step import RankMemory
from ascendspeed.utils.errors import UserError

KernelChoice = Literal["accelerator", "cpu"]


@dataclass(frozen=True)
class MemoryPlan:
    """Planned memory of a run."""

    run: Run
    devices: int
    ranks: tuple[RankMemory, ...]
    """The ranks that differ, by pipeline stage."""

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return max(rank.peak for rank in self.ranks)


def differing_ranks(parallel: ParallelConfig, world: int) -> list[int]:
    """First rank of the first, a middle and the last pipeline stage; ranks of one stage need the same."""
    stages = parallel.pipeline_model_parallel_size
    return [stage * (world // stages) for stage in sorted({0, stages // 2, stages - 1})]


def plan_memory(run: Run, devices: int, device: Device, kernels: KernelChoice = "accelerator") -> MemoryPlan:
    """Executes the engine of every rank that differs on fake tensors; `device` is the prepared CPU."""
    ranks = [
        plan_rank(run, devices, rank, device, kernels) for rank in differing_ranks(run.parallel, devices)
    ]
    return MemoryPlan(run, devices, tuple(ranks))


def plan_rank(
    run: Run,
    devices: int,
    rank: int,
    device: Device,
    kernels: KernelChoice = "accelerator",
    *,
    fake: bool = True,
) -> RankMemory:
    """Executes the engine of one rank on fake tensors; `fake=False`: on real ones of the CPU."""
    on_accelerator = kernels == "accelerator"
    imitation = accelerator_kernels.as_accelerator() if on_accelerator else contextlib.nullcontext()
    granularity = DEVICE_BLOCK if on_accelerator else 1
    with imitation:
        build = builder(device, kernels_of(run, kernels))
        return fake_step.measure(run, device, devices, rank, build, fake=fake, granularity=granularity)


def kernels_of(run: Run, kernels: KernelChoice) -> Kernels:
    """The kernels that training selects where no optional package is installed."""
    if kernels == "cpu":
        return Kernels()
    half = run.optim.dtype != "fp32"
    return accelerator_kernels.kernels(
        rms_norm=True,
        varlen=half
        and not run.train.attention_dropout
        and not run.train.deterministic
        and run.parallel.context_parallel_size == 1,
        weight_gradient=run.optim.bf16 and not run.train.no_gradient_accumulation_fusion,
    )


def builder(device: Device, kernels: Kernels) -> Any:
    """Returns the function (run, grid) -> engine without weights from a file."""

    def build(run: Run, grid: ProcessGrid) -> Any:
        if run.parallel.use_torch_fsdp2:
            raise UserError("--use-torch-fsdp2 cannot be planned; --deepspeed --zero-stage 3 shards the same")
        if not run.parallel.deepspeed:
            from ascendspeed.training.engines.megatron import MegatronEngine

            return MegatronEngine(run, grid, device, kernels, quantized_base(run))
        from ascendspeed.training.engines import without_idle_zero
        from ascendspeed.training.engines.deepspeed import DeepSpeedEngine
        from ascendspeed.training.engines.deepspeed_config import ds_config

        run = without_idle_zero(run, grid)
        config = ds_config(run, grid.world)
        return DeepSpeedEngine(run, grid, device, config, kernels, quantized_base(run))

    return build


def quantized_base(run: Run) -> Iterator[tuple[str, Tensor]] | None:
    """Undefined weights, which the engine quantises as those of a file; None if the run quantises nothing.

    They occupy no memory, as the files of a real run are mapped.
    """
    if run.lora.quantization_bit is None:
        return None
    from ascendspeed.models.gpt import gpt_model
    from ascendspeed.models.gpt.layer_spec import DTYPES

    dtype = DTYPES[run.optim.dtype]
    specs = gpt_model.shard_specs(run.model, run.parallel, run.lora)
    return ((name, torch.zeros(1, dtype=dtype).expand(spec.shape)) for name, spec in specs.items())
