"""Both sides of `train_step.py`, the project's and Hugging Face's, each in its own process."""

import importlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import Run
from ascendspeed.distributed import device
from ascendspeed.distributed.cpu_products import Products
from ascendspeed.models.families import FAMILIES

StepFunction = Callable[[], float]
"""Runs one step and returns its loss."""


@dataclass(frozen=True)
class SideInfo:
    """Facts that a side sends when it is ready."""

    device: str
    kind: str
    threads: int
    kernels: str


@dataclass(frozen=True)
class StepTiming:
    """Measurement of one step of one side."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of all threads; other load on the machine affects them less than wall time."""
    loss: float
    memory: int
    """Peak bytes during the step: of the device, or of the process beyond its imports."""


def worker(connection: Any, side: str, level: str, run: Run, threads: int | None) -> None:
    """Builds a side, sends `SideInfo`, then does one step for every true message and sends its timing; or
    sends an error.
    """
    try:
        here = device.prepare(run.train.device)
        torch = importlib.import_module("torch")
        for module in ("transformers",) if side == "theirs" else ("megatron.core", "deepspeed"):
            importlib.import_module(module)
        if threads:
            torch.set_num_threads(threads)
        idle = _resident("VmRSS") if here.kind == "cpu" else 0
        step, kernels = BUILDERS[side, level](run, here)
        _forget_peak()
        connection.send(SideInfo(here.name, here.kind, torch.get_num_threads(), kernels))
        while connection.recv():
            here.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step()
            here.synchronize()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            peak = _resident("VmHWM") if here.kind == "cpu" else here.peak_memory()
            connection.send(StepTiming(wall, cpu, loss, peak - idle))
    except Exception as error:
        connection.send(error)


def _resident(what: str) -> int:
    """Returns bytes of this process: `VmRSS` now, `VmHWM` at peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def _forget_peak() -> None:
    with suppress(OSError):  # without it, the peak includes building the model
        Path("/proc/self/clear_refs").write_text("5")


def batch_of(run: Run) -> Any:
    """Returns random tokens, all of them in the loss."""
    import torch

    from ascendspeed.data.dataset import Batch

    size, length = run.train.micro_batch_size, run.data.seq_length
    text = torch.randint(run.model.vocab_size, (size, length + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand(size, -1)
    return Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.ones(size, length), positions)


def our_model(run: Run, here: device.Device) -> tuple[StepFunction, str]:
    """Builds forward, loss and backward of the project's model."""
    from ascendspeed.distributed import process_groups
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    process_groups.initialize(here, run.parallel, run.train.seed)
    chosen = _kernels(run, here)
    config = layer_spec.transformer_config(run.model, run.parallel, run.train, run.optim.dtype, chosen)
    model = gpt_model.build_model(run.model, run.parallel, config)
    gpt_model.load_weights(
        model, run.model, run.parallel, param_mapping.random_tensors(run.model, run.train.seed, here.torch)
    )
    batch, to = batch_of(run), here.torch

    def forward() -> Any:
        losses = model(batch.tokens.to(to), batch.position_ids.to(to), None, labels=batch.labels.to(to))
        return (losses.float() * batch.loss_mask.to(to)).sum() / batch.loss_mask.numel()

    return _forward_backward(model, forward), str(chosen)


def _kernels(run: Run, here: device.Device) -> Any:
    from ascendspeed.distributed import fused_kernels

    products = Products.of_training(run)
    return fused_kernels.select_kernels(here, products=products, rms_norm=True, rotary=True, swiglu=True)


def our_step(run: Run, here: device.Device) -> tuple[StepFunction, str]:
    """Builds a complete step of the DeepSpeed engine, as the training loop calls it."""
    from ascendspeed.distributed import process_groups
    from ascendspeed.models import param_mapping
    from ascendspeed.training.engines import without_idle_zero
    from ascendspeed.training.engines.deepspeed import DeepSpeedEngine
    from ascendspeed.training.engines.deepspeed_config import ds_config

    grid = process_groups.initialize(here, run.parallel, run.train.seed)
    run, chosen = without_idle_zero(run, grid), _kernels(run, here)
    tensors = param_mapping.random_tensors(run.model, run.train.seed, here.torch)
    engine = DeepSpeedEngine(run, grid, here, ds_config(run, grid.world), chosen, tensors)
    batch = batch_of(run)
    return lambda: engine.step([batch], run.optim.lr).loss, str(chosen)


def their_model(run: Run, here: device.Device) -> tuple[StepFunction, str]:
    """Builds forward, loss and backward of Hugging Face's model, with its own loss function."""
    model, forward = _llama(run, here)
    return _forward_backward(model, forward), "torch"


def their_step(run: Run, here: device.Device, fused: bool | None = None) -> tuple[StepFunction, str]:
    """Builds Hugging Face's model, clipping and torch's AdamW (`fused` None: torch's default); bf16 over fp32
    masters.
    """
    import torch

    model, forward = _llama(run, here)
    optim, weights = run.optim, list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in weights] if optim.bf16 else weights
    decay, plain = ([p for p in masters if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = optim.adam_beta1, optim.adam_beta2
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.adam_eps, fused=fused)

    def step() -> float:
        loss = forward()
        loss.backward()
        if optim.bf16:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, optim.clip_grad)
        adamw.step()
        adamw.zero_grad()
        if optim.bf16:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        return float(loss.detach())

    return step, "torch"


def _forward_backward(model: Any, forward: Callable[[], Any]) -> StepFunction:
    parameters = list(model.parameters())

    def step() -> float:
        loss = forward()
        loss.backward()
        for parameter in parameters:
            parameter.grad = None
        return float(loss.detach())

    return step


def _llama(run: Run, here: device.Device) -> tuple[Any, Callable[[], Any]]:
    """Returns HF Llama (InternLM v1 is Llama with biases) with the project's weights, and its loss on the
    batch.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ascendspeed.models import param_mapping

    llama = replace(run.model, family="llama")
    config = LlamaConfig(**FAMILIES["llama"].write_config(llama), use_cache=False)
    kind = torch.bfloat16 if run.optim.bf16 else torch.float32
    with here.torch:
        model = LlamaForCausalLM._from_config(config, dtype=kind, attn_implementation="sdpa").train()
    tensors = param_mapping.random_tensors(run.model, run.train.seed, here.torch)
    with torch.no_grad():
        for parameter, (_, tensor) in zip(param_mapping.parameters(llama), tensors, strict=True):
            for name, part in param_mapping.megatron_to_hf(llama, parameter, tensor).items():
                model.get_parameter(name).copy_(part)
    batch, to = batch_of(run), here.torch
    return (
        model,
        lambda: model(batch.tokens.to(to), labels=batch.labels.to(to), shift_labels=batch.labels.to(to)).loss,
    )


BUILDERS: dict[tuple[str, str], Callable[[Run, device.Device], tuple[StepFunction, str]]] = {
    ("ours", "model"): our_model,
    ("ours", "step"): our_step,
    ("theirs", "model"): their_model,
    ("theirs", "step"): their_step,
    ("ours", "fused-step"): our_step,
    ("theirs", "fused-step"): partial(their_step, fused=True),
}
