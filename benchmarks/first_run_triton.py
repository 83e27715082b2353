"""Part `triton` of `gpu_first_run.py`: the Triton kernels against fp64, then beside torch's operations."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from first_run_parts import Part

PASSES = {"swiglu": 8 / 2, "rotary": 4, "cross_entropy": 3}
"""Passes over the input that forward and backward must make: SwiGLU's input [gate; up] is 2 f of its 8 f."""
BOUND = 1e-2
"""Largest relative difference from fp64 in bf16."""


def triton(part: "Part") -> None:
    """Correctness of every kernel first; then µs and GB/s of the bytes that must move."""
    from ascendspeed.config.schema import ParallelConfig
    from ascendspeed.distributed import process_groups

    process_groups.initialize(part.here, ParallelConfig(), 1)
    kernels, problem = _kernels(part)
    rows = part.table("Triton kernels in bf16, relative difference from fp64", "kernel", "value", "gradient")
    if not kernels:
        rows.append(["none", problem or "not compiled for this device", ""])
    for name, kernel in kernels.items():
        rows.append([name, *(f"{error:.1e}" for error in _errors(part, name, kernel))])
        if any(float(error) > BOUND for error in rows[-1][1:]):
            raise SystemExit(f"wrong: {name} differs from fp64 by more than {BOUND}")
    _measure(part, kernels)
    if problem:
        raise SystemExit(f"no Triton kernel runs: {problem}")


def _kernels(part: "Part") -> tuple[dict[str, Any], str]:
    """All kernels and the reason if there are none; on a CPU with TRITON_INTERPRET=1 the interpreter's."""
    from ascendspeed.distributed.triton_kernels import selection

    if part.is_dry and os.environ.get("TRITON_INTERPRET") == "1":
        return {name: selection.kernel(name) for name in selection.OPERATIONS}, ""
    return selection.select(part.here, ("auto",))


def _case(part: "Part", name: str, tokens: int) -> tuple[Any, Callable[..., Any]]:
    """Input and call(kernel, input) of an operation; the kernel None is torch's."""
    from ascendspeed.distributed import fused_kernels
    from ascendspeed.models.gpt.cross_entropy import cross_entropy

    torch, model = part.torch, part.model
    if name == "swiglu":
        x = part.random(tokens, 1, 2 * model.ffn_hidden_size)
        return x, lambda kernel, x: (kernel or fused_kernels.swiglu)(x)
    if name == "rotary":
        d = model.head_dim
        angles = torch.rand(tokens, 1, 1, d // 2, device=part.here.torch).repeat(1, 1, 1, 2)
        tables = angles.cos().bfloat16(), angles.sin().bfloat16()
        x = part.random(tokens, 1, model.num_attention_heads, d)
        return x, lambda kernel, x: (kernel or fused_kernels.rotary)(x, *(table.to(x) for table in tables))
    labels = torch.randint(model.vocab_size, (tokens, 1), device=part.here.torch)
    x = part.random(tokens, 1, model.vocab_size)
    # The backward pass overwrites the logits: those of a copy.
    return x, lambda kernel, x: cross_entropy(x * 1, labels.to(x.device), None, kernel=kernel)


def _errors(part: "Part", name: str, kernel: Any) -> list[float]:
    """Relative differences of the value and of the gradient from torch in fp64, or fp32 for the loss."""
    x, call = _case(part, name, 3 if part.is_dry else 257)
    results = []
    for operation, given in ((kernel, x), (None, x.float() if name == "cross_entropy" else x.double())):
        given = given.detach().requires_grad_()
        out = call(operation, given)
        weights = part.torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape).to(out)
        results.append([out.detach().double(), part.torch.autograd.grad(out, given, weights)[0].double()])
    return [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]


def _measure(part: "Part", kernels: dict[str, Any]) -> None:
    from first_run_parts import forward_backward

    columns = ("operation", "kernel", "forward µs", "backward µs", "GB/s")
    rows = part.table(
        "Triton's and torch's operations in bf16; cross entropy with a copy of its logits", *columns
    )
    for name, passes in PASSES.items():
        x, call = _case(part, name, 4 if part.is_dry else 2048)
        x.requires_grad_()
        for source, kernel in (("torch", None), *([("triton", kernels[name])] if name in kernels else [])):
            gradient = part.torch.ones_like(call(kernel, x))
            forward, backward = forward_backward(
                part, lambda call=call, kernel=kernel, x=x: call(kernel, x), [x], gradient
            )
            rate = passes * x.numel() * x.element_size() / (forward + backward) / 1e9
            rows.append([name, source, f"{forward * 1e6:.0f}", f"{backward * 1e6:.0f}", f"{rate:.0f}"])
