"""Parts of `gpu_first_run.py`; each writes its tables as JSON.

Engines run in processes of their own, since what is left of one is no part of the next.
"""

import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from first_run_serving import serving
from first_run_triton import triton
from gpu_first_run import START_PART

from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.distributed import device as devices
from ascendspeed.distributed import training_kernels
from ascendspeed.models.families import preset

Call = Callable[[], Any]
MODEL = preset("internlm-7b")
TOY = replace(
    MODEL, num_layers=2, hidden_size=128, ffn_hidden_size=344, num_attention_heads=2, vocab_size=1024
)
LEAST_MEMORY = 139 * 2**30
"""Bytes of a device that holds all layers of the 7B; others take `FEW_LAYERS`."""
FEW_LAYERS = 8
ENGINE_LIMIT = 75
"""Seconds of one engine."""
TOLERANCE = 5e-5
"""Largest relative difference of fp32 losses on the device and on a CPU."""


@dataclass(frozen=True)
class EngineCase:
    """One configuration of an engine, with the forecast of the simulation for 7B on an H200."""

    micro_batch: int
    zero: Literal[1, 2] | None = None
    """ZeRO stage; None: Megatron-core's engine."""
    recompute: Literal["none", "full"] = "none"
    fused_sums: bool = True
    """Linears add their weight gradients to the fp32 sums."""
    remainders: bool = False
    """Masters are kept as weights and 16 bits."""
    peak: float | None = None
    """GiB."""
    token: float | None = None
    """Microseconds per token, by a roofline."""


CASES = {
    "Megatron, micro-batch 1": EngineCase(1, peak=134.4, token=64.0),
    "Megatron, micro-batch 1, separate sums": EngineCase(1, fused_sums=False, peak=134.4, token=72.9),
    "Megatron, micro-batch 2, masters in 16 bits": EngineCase(2, remainders=True, peak=131.5),
    "ZeRO-1, micro-batch 1": EngineCase(1, zero=1, peak=135.5),
    "ZeRO-2, micro-batch 2, full recompute": EngineCase(2, zero=2, recompute="full", peak=128.9, token=102.8),
    "Megatron, micro-batch 4, full recompute": EngineCase(
        4, recompute="full", fused_sums=False, peak=127.3, token=86.4
    ),
}

LOSSES = {"Megatron": EngineCase(1), "ZeRO-1": EngineCase(1, zero=1), "ZeRO-2": EngineCase(1, zero=2)}


class Part:
    """Base of the parts: the device, toy sizes on a CPU, clocks and tables."""

    def __init__(self, here: devices.Device, folder: Path) -> None:
        import torch

        self.torch, self.here, self.folder = torch, here, folder
        self.is_dry = here.kind == "cpu"
        self.model = TOY if self.is_dry else MODEL
        self.tables: list[dict[str, Any]] = []

    def table(self, title: str, *columns: str) -> list[list[Any]]:
        """Starts a table; returns its rows, to be appended to."""
        self.tables.append({"title": title, "columns": list(columns), "rows": []})
        return self.tables[-1]["rows"]

    def random(self, *shape: int, dtype: Any = None) -> Any:
        """Normal numbers on the device, in bf16."""
        return self.torch.randn(*shape, device=self.here.torch).to(dtype or self.torch.bfloat16)

    def seconds(self, call: Call, budget: float = 0.06) -> float:
        """Median seconds of a call over three series of about `budget` seconds, after a warm-up."""
        call()
        self.here.synchronize()
        began = time.perf_counter()
        call()
        self.here.synchronize()
        count = 1 if self.is_dry else max(2, min(200, int(budget / (time.perf_counter() - began))))
        series = []
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(count):
                call()
            self.here.synchronize()
            series.append((time.perf_counter() - began) / count)
        return statistics.median(series)


# ---------------------------------------------------------------- correctness


def right(part: Part) -> None:
    """Losses of both engines against a CPU's, fused kernels against fp64, AdamW beyond 2^31 elements."""
    rows = part.table("Correctness", "what", "difference", "at most", "result")

    def check(what: str, difference: float, bound: float) -> None:
        rows.append([what, f"{difference:.1e}", f"{bound:.0e}", "right" if difference <= bound else "WRONG"])

    here, cpu = (json.loads(_child("losses", kind, ",".join(LOSSES))) for kind in (part.here.kind, "cpu"))
    for i, name in enumerate(LOSSES):
        worst = max(abs(a - b) / abs(b) for a, b in zip(here[i], cpu[i], strict=True))
        check(f"losses of {name}, fp32, three steps, against a CPU", worst, TOLERANCE)
    _check_kernels(part, check)
    if part.here.fused_adamw:
        check("fused AdamW beyond 2^31 elements: spread", _adamw_spread(part), 0.0)
    wrong = [row[0] for row in rows if row[-1] == "WRONG"]
    if wrong:
        raise SystemExit(f"wrong: {'; '.join(wrong)}")


def _check_kernels(part: Part, check: Callable[[str, float, float], None]) -> None:
    from ascendspeed.distributed import fused_kernels

    x, weight, gradient = part.random(256, 2, 512), part.random(512), part.random(256, 384)
    calls = {
        "rms_norm": lambda kernel, *x: kernel(*x, 1e-6),
        "swiglu": lambda kernel, x, weight: kernel(x),
    }
    for name, call in calls.items():
        if kernel := training_kernels.fused_kernel(part.here, name):
            exact = call(getattr(fused_kernels, name), x.cpu().double(), weight.cpu().double())
            check(f"{kernel.source} in bf16, against fp64", _error(call(kernel.call, x, weight), exact), 1e-2)
    if kernel := training_kernels.fused_kernel(part.here, "weight_gradient"):
        rows, total = x.flatten(0, 1)[:256], part.random(384, 512, dtype=part.torch.float32)
        exact = total.cpu().double() + gradient.cpu().double().t() @ rows.cpu().double()
        kernel.call(rows, gradient, total)
        check(f"{kernel.source} into fp32 sums, against fp64", _error(total, exact), 1e-5)


def _error(actual: Any, exact: Any) -> float:
    return float((actual.cpu().double() - exact).norm() / exact.norm())


def _adamw_spread(part: Part) -> float:
    """Largest minus smallest weight after equal updates of a tensor larger than 32 bits can index."""
    torch = part.torch
    count = 1 << 16 if part.is_dry else (1 << 31) + (1 << 20)
    weight = torch.full((count,), 0.5, device=part.here.torch).requires_grad_()
    weight.grad = torch.full_like(weight, 0.25)
    torch.optim.AdamW([weight], lr=1e-2, fused=True).step()
    return float(weight.detach().max() - weight.detach().min())


# ---------------------------------------------------------------- rates


def gemm(part: Part) -> None:
    """TFLOP/s of the five products of a layer and the head, forward, backward and into fp32 sums."""
    h, f, vocab = part.model.hidden_size, part.model.ffn_hidden_size, part.model.vocab_size
    shapes = {"qkv": (3 * h, h), "proj": (h, h), "fc1": (2 * f, h), "fc2": (h, f), "head": (vocab, h)}
    into_sums = training_kernels.fused_kernel(part.here, "weight_gradient")
    columns = ("forward", "dgrad", "wgrad", "wgrad and add", "wgrad into fp32")
    for tokens in (64,) if part.is_dry else (2048, 4096, 8192):
        rows = part.table(f"TFLOP/s in bf16, {tokens} tokens", "product", *columns)
        for name, (n, k) in shapes.items():
            x, weight, gradient = part.random(tokens, k), part.random(n, k), part.random(tokens, n)
            total = part.torch.zeros(n, k, device=part.here.torch)
            calls: list[Call | None] = [
                lambda x=x, weight=weight: x @ weight.t(),
                lambda gradient=gradient, weight=weight: gradient @ weight,
                lambda gradient=gradient, x=x: gradient.t() @ x,
                lambda gradient=gradient, x=x, total=total: total.add_(gradient.t() @ x),
                (lambda x=x, g=gradient, total=total: into_sums.call(x, g, total)) if into_sums else None,
            ]
            flops = 2.0 * tokens * n * k
            rates = [f"{flops / part.seconds(call) / 1e12:.3g}" if call else "-" for call in calls]
            rows.append([name, *rates])


def attention(part: Part) -> None:
    """Forward and backward of causal SDPA by backend, in the strides of this project."""
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, d, s = (2, 64, 64) if part.is_dry else (32, 128, 2048)
    backends: dict[str, Any] = {"default": None, "flash": SDPBackend.FLASH_ATTENTION}
    backends |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    rows = part.table(
        "Causal attention in bf16", "samples", "backend", "forward TFLOP/s", "backward", "µs/token"
    )
    for b in (1,) if part.is_dry else (1, 2, 4):
        inputs = [part.random(s, b, heads, d).permute(1, 2, 0, 3).requires_grad_() for _ in range(3)]
        flops = 2.0 * b * heads * s * s * d
        for name, backend in backends.items():
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                try:
                    gradient = part.torch.randn_like(F.scaled_dot_product_attention(*inputs, is_causal=True))
                except RuntimeError as error:
                    rows.append([b, name, f"none: {str(error)[:60]}", "", ""])
                    continue
                forward, backward = forward_backward(
                    part,
                    lambda x=inputs: F.scaled_dot_product_attention(*x, is_causal=True),
                    inputs,
                    gradient,
                )
            layers = (forward + backward) / (b * s) * part.model.num_layers * 1e6
            rates = [flops / forward / 1e12, 2.5 * flops / backward / 1e12, layers]
            rows.append([b, name, *(f"{rate:.3g}" for rate in rates)])

    _chosen_backend(part)


def _chosen_backend(part: Part) -> None:
    """Times and choice of --sdpa-backend auto for a micro-batch of the model."""
    from ascendspeed.distributed import sdpa_backend

    heads, d, s = (2, 64, 64) if part.is_dry else (32, 128, 2048)
    shape = sdpa_backend.AttentionShape(1, s, heads, heads, d, part.torch.bfloat16)
    name, times = sdpa_backend.measure(shape, part.here)
    part.table("--sdpa-backend auto", "choice", "log").append([name or "default", times.strip(" ,")])


def forward_backward(part: Part, call: Call, inputs: list[Any], gradient: Any) -> tuple[float, float]:
    """Seconds of the forward pass, and of the backward pass as the difference to both."""
    forward = part.seconds(call)
    both = part.seconds(lambda: part.torch.autograd.grad(call(), inputs, gradient))
    return forward, max(both - forward, 1e-9)


def pointwise(part: Part) -> None:
    """GB/s of RMSNorm, SwiGLU and rotary, of the bytes that must move: torch's and the device's kernels."""
    from ascendspeed.distributed import fused_kernels

    torch, h, f = part.torch, part.model.hidden_size, part.model.ffn_hidden_size
    s, d = (64, 64) if part.is_dry else (4096, 128)
    heads = h // d
    angles = torch.rand(s, 1, 1, d // 2, device=part.here.torch).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    weight = torch.ones(h, device=part.here.torch, dtype=torch.bfloat16)
    cases = {
        "rms_norm": (part.random(s, 1, h), lambda kernel, x: kernel(x, weight, 1e-6), 5),
        "swiglu": (part.random(s, 1, 2 * f), lambda kernel, x: kernel(x), 4),
        "rotary": (part.random(s, 1, heads, d), lambda kernel, x: kernel(x, cos, sin), 4),
    }
    rows = part.table(
        "Pointwise operations in bf16", "operation", "kernel", "forward µs", "backward µs", "GB/s"
    )
    for name, (x, call, passes) in cases.items():
        x.requires_grad_()
        fused = training_kernels.fused_kernel(part.here, name)
        for source, kernel in [
            ("torch", getattr(fused_kernels, name)),
            *([(fused.source, fused.call)] if fused else []),
        ]:
            gradient = torch.randn_like(call(kernel, x))
            forward, backward = forward_backward(
                part, lambda call=call, kernel=kernel, x=x: call(kernel, x), [x], gradient
            )
            moved = passes * x.numel() * x.element_size()
            rate = moved / (forward + backward) / 1e9
            rows.append([name, source, f"{forward * 1e6:.0f}", f"{backward * 1e6:.0f}", f"{rate:.0f}"])


# ---------------------------------------------------------------- engines


def engine(part: Part) -> None:
    """Whole steps of both engines: tokens/s and peak memory beside the forecast."""
    rows = part.table(
        "Whole steps in bf16, 2,048 tokens per sample; forecast for 32 layers on an H200",
        *("configuration", "layers", "tokens/s", "µs/token", "forecast", "peak GiB", "forecast", "loss"),
    )
    for name, case in CASES.items():
        try:
            result = json.loads(_child("step", part.here.kind, name, timeout=ENGINE_LIMIT))
        except (subprocess.SubprocessError, IndexError) as error:
            rows.append(
                [name, "", f"failed: {str(error)[-120:]}", "", case.token or "", "", case.peak or "", ""]
            )
            continue
        layers, tokens, peak, loss = result
        forecast = (case.token or "", case.peak or "") if layers == MODEL.num_layers else ("", "")
        measured = [layers, f"{tokens:.0f}", f"{1e6 / tokens:.1f}", forecast[0], f"{peak:.1f}", forecast[1]]
        rows.append([name, *measured, f"{loss:.4f}"])
    if failed := [row[0] for row in rows if str(row[2]).startswith("failed")]:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def step_of(
    here: devices.Device, case: EngineCase, model: ModelConfig, passes: int, dtype: str = "bf16"
) -> tuple[Call, int]:
    """Builds an engine with random weights and batches; returns its step and the tokens of a step."""
    import torch

    from ascendspeed.data.dataset import Batch
    from ascendspeed.distributed import fused_kernels, process_groups
    from ascendspeed.training import engines

    length = 64 if here.kind == "cpu" or model is TOY else 2048
    with tempfile.TemporaryDirectory() as logs:
        run = Run(
            model,
            ParallelConfig(deepspeed=case.zero is not None, zero_stage=case.zero or 2),
            OptimConfig(bf16=dtype == "bf16", store_param_remainders=case.remainders),
            DataConfig(data_path=("random",), seq_length=length),
            TrainConfig(
                micro_batch_size=case.micro_batch,
                global_batch_size=case.micro_batch * passes,
                recompute_granularity=case.recompute,
                log_dir=logs,
            ),
        )
        grid = process_groups.initialize(here, run.parallel, run.train.seed)
        fused = {"rms_norm": dtype == "bf16", "swiglu": dtype == "bf16", "weight_gradient": case.fused_sums}
        kernels = fused_kernels.select_kernels(here, triton=("auto",), **fused)
        built = engines.engine_builder(run, grid, here, kernels)(_weights(model, here))
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(passes):
        text = torch.randint(model.vocab_size, (case.micro_batch, length + 1), generator=generator)
        positions = torch.arange(length).expand(case.micro_batch, -1)
        ones = torch.ones(case.micro_batch, length)
        batches.append(Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), ones, positions))
    return lambda: built.step(batches, 1e-4), case.micro_batch * length * passes


def _weights(model: ModelConfig, here: devices.Device) -> Iterator[tuple[str, Any]]:
    """Random weights: a CPU's for the toy, so that devices can be compared, else drawn on the device."""
    import torch

    from ascendspeed.models import param_mapping

    if model is TOY:
        yield from param_mapping.random_tensors(model, 1, here.torch)
        return
    for parameter in param_mapping.parameters(model):
        shape = parameter.shape
        scale = model.init_method_std / math.sqrt(2 * model.num_layers)
        ones = torch.ones(shape, device=here.torch)
        yield parameter.name, ones if len(shape) == 1 else torch.randn(shape, device=here.torch).mul_(scale)


def losses(here: devices.Device, names: str) -> list[list[float]]:
    """Losses of three fp32 steps of toy engines, named with commas in between."""
    curves = []
    for name in names.split(","):
        run, _ = step_of(here, LOSSES[name], TOY, 2, "fp32")
        curves.append([run().loss for _ in range(3)])
    return curves


def step(here: devices.Device, name: str) -> list[float]:
    """(layers, tokens/s, peak GiB, loss) of a case: the median of three steps after two."""
    run, tokens = step_of(here, CASES[name], _model_for(here), 2 if here.kind == "cpu" else 8)
    for _ in range(2):
        result = run()
    series = []
    for _ in range(3):
        here.synchronize()
        began = time.perf_counter()
        result = run()
        here.synchronize()
        series.append(time.perf_counter() - began)
    peak = here.peak_memory() / 2**30
    return [_model_for(here).num_layers, tokens / statistics.median(series), peak, result.loss]


def _model_for(here: devices.Device) -> ModelConfig:
    """The 7B, fewer of its layers on a small device, a toy on a CPU."""
    if here.kind == "cpu":
        return TOY
    import torch

    memory = getattr(torch, here.kind).get_device_properties(here.index).total_memory
    return MODEL if memory >= LEAST_MEMORY else replace(MODEL, num_layers=FEW_LAYERS)


def trace(part: Part) -> None:
    """One step under torch.profiler: the operations by time, and trace.json for a viewer."""
    profiler = part.torch.profiler
    run, _ = step_of(part.here, CASES["Megatron, micro-batch 1"], _model_for(part.here), 2)
    run()
    activities = [profiler.ProfilerActivity.CPU]
    if not part.is_dry:  # torch_npu puts its own activity in this place
        activities.append(profiler.ProfilerActivity.CUDA)
    with profiler.profile(activities=activities) as profile:
        run()
        part.here.synchronize()
    profile.export_chrome_trace(str(part.folder / "trace.json"))
    key = "self_cpu_time_total" if part.is_dry else "self_device_time_total"
    averages = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    rows = part.table("Operations of a step by their own time", "operation", "calls", "ms")
    rows += [[event.key[:70], event.count, f"{getattr(event, key) / 1e3:.2f}"] for event in averages[:20]]


# ---------------------------------------------------------------- processes

PARTS = {
    function.__name__: function
    for function in (right, gemm, triton, engine, serving, attention, pointwise, trace)
}
CHILDREN: dict[str, Callable[[devices.Device, str], list[Any]]] = {"losses": losses, "step": step}


def _child(what: str, kind: str, name: str, timeout: float = ENGINE_LIMIT) -> str:
    """Last line of stdout of another process of this file, which is its result as JSON."""
    limit = timeout * (4 if kind == "cpu" else 1)
    done = subprocess.run([*START_PART, what, kind, name], capture_output=True, text=True, timeout=limit)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise subprocess.SubprocessError(f"exit code {done.returncode}: {lines[-1]}")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Runs a part and writes its tables, also those of a part that fails; or prints the result of a child."""
    name, kind, rest = sys.argv[1:]
    here = devices.prepare(kind)
    if child := CHILDREN.get(name):
        print(json.dumps(child(here, rest)))
        return
    part = Part(here, Path(rest))
    try:
        PARTS[name](part)
    finally:
        (part.folder / f"{name}.json").write_text(json.dumps(part.tables))
