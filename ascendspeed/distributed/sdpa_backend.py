"""Backend of torch's scaled dot product attention (`--sdpa-backend`), by flag or by measurement."""

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ascendspeed.config.schema import Run
from ascendspeed.distributed.device import Device
from ascendspeed.utils.errors import UserError

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Values of --sdpa-backend, without auto and default."""
MEASURED = ("flash", "cudnn", "efficient")
"""Backends that --sdpa-backend auto measures; math keeps all scores."""
NOT_DETERMINISTIC = ("cudnn",)
"""Backends that torch does not use under --deterministic."""
ROUNDS = 5


@dataclass(frozen=True)
class AttentionShape:
    """Causal attention of a micro-batch on one rank."""

    samples: int
    length: int
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, run: Run) -> "AttentionShape":
        """The attention of a training run."""
        model, tp = run.model, run.parallel.tensor_model_parallel_size
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.optim.dtype]
        return cls(
            run.train.micro_batch_size,
            run.data.seq_length,
            model.num_attention_heads // tp,
            max(1, model.kv_heads // tp),
            model.head_dim,
            dtype,
        )


Timer = Callable[[str, AttentionShape, Device], float]
"""Seconds of forward and backward with a backend; raises `RuntimeError` if it does not run."""


def context(backend: str | None) -> AbstractContextManager[object]:
    """Context in which attention is computed by a backend; None: by torch's choice."""
    return sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext()


def seconds(backend: str, shape: AttentionShape, device: Device) -> float:
    """Least time of `ROUNDS` forward and backward passes in the strides of the model, after a warm-up."""
    q, k, v = (
        torch.full(
            (shape.length, shape.samples, heads, shape.head_dim), 0.1, dtype=shape.dtype, device=device.torch
        )
        .permute(1, 2, 0, 3)
        .requires_grad_()
        for heads in (shape.heads, shape.groups, shape.groups)
    )
    gradient = torch.full_like(q, 0.1)
    times = []
    for _ in range(ROUNDS + 1):
        device.synchronize()
        began = time.perf_counter()
        with context(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=shape.heads != shape.groups
            )
        torch.autograd.grad(out, (q, k, v), gradient)
        device.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def choose(run: Run, device: Device, timer: Timer = seconds) -> tuple[str | None, str]:
    """The backend of a run (None: torch's choice), and the text for the log. Collective for auto.

    Rank 0 measures and its choice is that of all ranks: backends differ by rounding, and replicas of a
    weight must have equal gradients. Raises `UserError` for a backend that the device or the run cannot have.
    """
    choice, shape = run.train.sdpa_backend, AttentionShape.of(run)
    if choice == "default":
        return None, "torch SDPA"
    if choice != "auto":
        _check(choice, run, device)
        _check_runs(choice, shape, device, timer)
        return choice, f"torch SDPA, {choice}"
    if (reason := _unmeasured(run, device)) is not None:
        return None, f"torch SDPA{reason}"
    name, text = measure(shape, device, timer) if _rank() == 0 else ("", "")
    name, text = _from_first_rank((name, text))
    return name or None, f"torch SDPA{text}"


def measure(shape: AttentionShape, device: Device, timer: Timer = seconds) -> tuple[str, str]:
    """The fastest backend that runs ("" if none does), and the times of all for the log."""
    times = {}
    for name in MEASURED:
        with contextlib.suppress(RuntimeError):  # of a backend that does not support the shape or device
            times[name] = timer(name, shape, device)
    if not times:
        return "", " (no other backend runs)"
    fastest = min(times, key=lambda name: times[name])
    listed = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in times.items())
    return fastest, f", {fastest} (measured: {listed})"


def _check(choice: str, run: Run, device: Device) -> None:
    """Raises `UserError` for a named backend that the device or the run cannot have."""
    flag = f"--sdpa-backend {choice}"
    if choice != "math" and not device.has_sdpa_backends:
        raise UserError(f"{flag}: a {device.kind} has no such backend; use default, auto or math")
    if run.train.deterministic and choice in NOT_DETERMINISTIC:
        raise UserError(f"{flag} does not go with --deterministic; use flash, efficient or math")
    if run.parallel.context_parallel_size > 1 and choice in ("flash", "cudnn"):
        raise UserError(f"{flag} has no masks, which context parallel needs; use default or efficient")


def _check_runs(choice: str, shape: AttentionShape, device: Device, timer: Timer) -> None:
    """Raises `UserError` if a named backend does not run for the shape of the run."""
    if choice == "math":
        return
    try:
        timer(choice, shape, device)
    except RuntimeError as error:
        raise UserError(
            f"--sdpa-backend {choice} does not run for {shape}: {str(error).splitlines()[0][:120]}; use auto"
        ) from error


def _unmeasured(run: Run, device: Device) -> str | None:
    """Returns why auto takes torch's choice, for the log; None if it measures."""
    if not device.has_sdpa_backends:
        return ""
    if run.train.deterministic:
        return " (not measured: --deterministic must choose alike in every run)"
    if run.train.attention_dropout or run.parallel.context_parallel_size > 1:
        return " (not measured: attention in blocks)"
    return None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_first_rank(value: tuple[str, str]) -> tuple[str, str]:
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
