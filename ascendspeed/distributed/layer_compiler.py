"""torch.compile for the transformer layers of a training run (`--compile`): the choice, the compiler's
requirements and its settings."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ascendspeed.config.schema import Run
from ascendspeed.distributed.device import Device
from ascendspeed.utils.errors import UserError

FLAG = "--compile"
GRAPHS = 64
"""Most graphs of a layer's code: with and without gradients, whole rows and packed ones, for every shape."""


@dataclass(frozen=True)
class LayerCompiler:
    """Compiles each layer as a single graph; another process compiles it anew, or reads torch's cache."""

    backend: str = "inductor"
    """Compiler of torch.compile."""
    memory_budget: float | None = None
    """Share of the activations of a layer that its backward pass may keep; None: torch's rule."""

    def compile(self, layer: torch.nn.Module) -> None:
        """Lets the layer be compiled at its first call; its parameters keep their names."""
        _set_limits(self.memory_budget)
        # Dropout masks of the eager generator, so that a run with dropout has the same losses.
        options: dict[str, Any] = {"fallback_random": True} if self.backend == "inductor" else {}
        layer.compile(fullgraph=True, dynamic=False, backend=self.backend, options=options or None)


def _set_limits(memory_budget: float | None) -> None:
    """Sets what torch has no argument for."""
    import torch._dynamo.config
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if memory_budget is not None:
        torch._functorch.config.activation_memory_budget = memory_budget


def choose(run: Run, device: Device) -> tuple[LayerCompiler | None, str]:
    """The compiler of a run with --compile, and the text for the log; None if its layers stay uncompiled.

    Raises `UserError` if the device or the machine has no compiler.
    """
    if reason := obstacle(run):
        return None, f"not compiled ({reason})"
    check_compiler(device)
    budget = run.train.compile_activation_memory_budget
    kept = "" if budget is None else f", activation memory budget {budget:g}"
    return LayerCompiler(memory_budget=budget), f"torch.compile, one graph each{kept}"


OBSTACLES: tuple[tuple[str, Callable[[Run], bool]], ...] = (
    ("TP above 1 exchanges within a layer", lambda run: run.parallel.tensor_model_parallel_size > 1),
    ("CP above 1 exchanges within a layer", lambda run: run.parallel.context_parallel_size > 1),
    ("experts have as many tokens as are routed to them", lambda run: bool(run.model.num_experts)),
    (
        "ZeRO-3 gathers weights within a layer; --use-torch-fsdp2 does so before it",
        lambda run: run.parallel.deepspeed and run.parallel.zero_stage == 3,
    ),
    (
        "selective recomputation is within a layer; use full, or the activation memory budget",
        lambda run: run.train.recompute_granularity == "selective",
    ),
    ("attention dropout has random states of its own", lambda run: bool(run.train.attention_dropout)),
    (
        "LoRA dropout has random states of its own",
        lambda run: bool(run.lora.lora_rank and run.lora.lora_dropout),
    ),
)
"""(reason, true for a run whose layers are no single graph, or were not compiled in a test)."""


def obstacle(run: Run) -> str | None:
    """Returns why the layers of a run are no single graph; None if they are."""
    return next((reason for reason, applies in OBSTACLES if applies(run)), None)


def check_compiler(device: Device) -> None:
    """Raises `UserError` if torch.compile has no compiler for the device."""
    if device.compiles_triton:
        if importlib.util.find_spec("triton") is None:
            raise UserError(f"{FLAG} needs Triton on a GPU; pip install triton, or leave {FLAG} out")
        return
    if device.kind != "cpu":
        raise UserError(f"{FLAG}: torch.compile has no compiler for {device.kind}; leave it out")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            f"{FLAG} needs a C++ compiler on a CPU, and there is none; install g++, name one by CXX, or "
            f"leave {FLAG} out"
        ) from error
