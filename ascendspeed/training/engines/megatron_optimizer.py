"""Megatron-core's optimizer with torch's AdamW, its gradient norm, and the masters that it keeps."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from ascendspeed.config.schema import OptimConfig, Run
from ascendspeed.distributed.device import Device
from ascendspeed.training.engines.common import adamw_settings, new_adamw_state
from ascendspeed.training.engines.split_masters import SplitAdamW


def build_optimizer(run: Run, params_dtype: torch.dtype, chunks: Sequence[Any], device: Device) -> Any:
    """Megatron-core's chained optimizer of the wrapped model chunks, with torch's AdamW."""
    settings = _settings(run, params_dtype)
    optimizer = get_megatron_optimizer(settings, list(chunks), use_gloo_process_groups=False)
    for chained in optimizer.chained_optimizers:
        chained.optimizer = new_adamw(run.optim, chained.optimizer.param_groups, device, chained)
        if run.optim.store_param_remainders:  # the update writes the weights
            chained._copy_main_params_to_model_params = lambda: None
    return optimizer


def _settings(run: Run, params_dtype: torch.dtype) -> OptimizerConfig:
    optim, parallel = run.optim, run.parallel
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=optim.bf16,
        fp16=optim.fp16,
        params_dtype=params_dtype,
        initial_loss_scale=optim.initial_loss_scale,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def new_adamw(
    optim: OptimConfig, groups: Sequence[dict[str, Any]], device: Device, chained: Any = None
) -> torch.optim.AdamW:
    """torch's AdamW, whatever else is installed, with Megatron-core's parameter groups and with its states.

    `chained`: the optimizer of Megatron-core, which --store-param-remainders needs.
    """
    adamw = (SplitAdamW if optim.store_param_remainders else torch.optim.AdamW)(
        [{"params": [], "weight_decay": optim.weight_decay * group["wd_mult"]} for group in groups],
        **adamw_settings(optim, device),
    )
    if isinstance(adamw, SplitAdamW):  # before there are moments: both would not fit
        adamw.split(weights_and_masters(chained))
    for new_group, group in zip(adamw.param_groups, groups, strict=True):
        # Set afterwards: a shard is a view of a parameter, which the constructor would refuse.
        new_group["params"] = group["params"]
        for master in group["params"]:
            adamw.state[master].update(new_adamw_state(master, device))
    return adamw


def grad_norm(optimizer: Any, device: Device) -> float:
    """Global norm of the gradients as Megatron-core defines it.

    Without Apex, Megatron-core waits for the device once per parameter; this waits once.
    """
    optimizers = optimizer.chained_optimizers
    if len(optimizers) == 1 or optimizer.grads_states_parallel_group_is_shared():
        return _norm_of(optimizers, device)
    return math.sqrt(sum(_norm_of([chained], device) ** 2 for chained in optimizers))


def _norm_of(optimizers: list[Any], device: Device) -> float:
    """Gradient norm of the parameters of optimizers that share one process group."""
    gradients = [g for chained in optimizers for g in chained.get_main_grads_for_grad_norm()]
    if gradients:
        norm = torch.stack(torch._foreach_norm(gradients)).norm().view(1)
    else:
        norm = torch.zeros(1, device=device.torch)
    square = norm**2.0
    dist.all_reduce(square, group=optimizers[0].get_grad_stats_parallel_group())
    return square.item() ** 0.5


def clip_gradients(masters: Sequence[Tensor], limit: float, norm: float) -> None:
    """Scales gradients whose global norm is above the limit; 0: no limit."""
    coefficient = limit / (norm + 1e-6)  # Megatron-core's, to the bit
    if limit and coefficient < 1:
        gradients = [master.grad for master in masters if master.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, coefficient)


SCALER_COUNTERS = ("_growth_tracker", "_hysteresis_tracker")


def loss_scale_state(optimizer: Any) -> dict[str, Any]:
    """fp16's loss scale and its counters, as they are saved."""
    scaler = optimizer.chained_optimizers[0].grad_scaler
    counters = {name: getattr(scaler, name) for name in SCALER_COUNTERS}
    return {"loss_scale": float(scaler.scale), "grad_scaler": counters}


def restore_loss_scale(optimizer: Any, scalars: dict[str, Any]) -> None:
    """Restores the result of `loss_scale_state`."""
    for chained in optimizer.chained_optimizers:
        chained.grad_scaler._scale.fill_(scalars["loss_scale"])
        for name, value in scalars.get("grad_scaler", {}).items():
            setattr(chained.grad_scaler, name, value)


def state_of(optimizer: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a master."""
    states = (chained.optimizer.state for chained in optimizer.chained_optimizers)
    return next(state[master] for state in states if master in state)


def parameters_and_masters(chained: Any) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each parameter with its fp32 master (or this rank's shard of it) in a Megatron-core optimizer."""
    if isinstance(chained, DistributedOptimizer):
        groups = zip(
            chained.model_fp32_groups + chained.model_float16_groups,
            chained.shard_fp32_groups + chained.shard_fp32_from_float16_groups,
            strict=True,
        )
    elif hasattr(chained, "float16_groups"):
        groups = zip(
            chained.fp32_from_fp32_groups + chained.float16_groups,
            chained.fp32_from_fp32_groups + chained.fp32_from_float16_groups,
            strict=True,
        )
    else:
        groups = ((group["params"], group["params"]) for group in chained.optimizer.param_groups)
    for parameters, masters in groups:
        yield from zip(parameters, masters, strict=True)


def weights_and_masters(chained: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each bf16 weight (or this rank's shard of it) with its fp32 master in a Megatron-core optimizer."""
    if isinstance(chained, DistributedOptimizer):
        groups = zip(chained.shard_float16_groups, chained.shard_fp32_from_float16_groups, strict=True)
    else:
        groups = zip(chained.float16_groups, chained.fp32_from_float16_groups, strict=True)
    for weights, masters in groups:
        yield from zip(weights, masters, strict=True)


def replica_group(parameter: torch.nn.Parameter) -> Any:
    """Process group of the ranks that hold the same part of a parameter."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()
