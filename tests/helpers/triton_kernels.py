"""Triton kernels without a GPU: the interpreter in this process, and the compiler for sm_90."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

MODULES = {
    "swiglu": ("forward_kernel", "backward_kernel"),
    "rotary": ("rotate_kernel",),
    "cross_entropy": ("statistics_kernel", "gradient_kernel"),
}
"""Module of `triton_kernels` -> its kernels."""
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


def module(name: str) -> Any:
    """The module of an operation."""
    return importlib.import_module(f"ascendspeed.distributed.triton_kernels.{name}")


def interpret(monkeypatch: pytest.MonkeyPatch, *owners: Any) -> None:
    """Makes kernels run in Triton's interpreter, as with TRITON_INTERPRET=1 in the environment.

    Triton reads that variable when a function is decorated, and other tests of this process may have imported
    it before. `owners`: modules; default: all.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # It cuts digits off for bf16, where a device rounds to the nearest (cvt.rn).
    convert = interpreter._convert_float
    monkeypatch.setattr(
        interpreter,
        "_convert_float",
        lambda x, of, to, mode: _to_bf16(x) if to == tl.bfloat16 else convert(x, of, to, mode),
    )
    # The interpreter imports it on its first call; it must find the functions of triton.language unchanged.
    importlib.import_module("triton.experimental.gluon")
    for owner in owners or map(module, MODULES):
        for name in MODULES[owner.__name__.rsplit(".", 1)[-1]]:
            if isinstance(function := getattr(owner, name), JITFunction):
                monkeypatch.setattr(owner, name, InterpretedFunction(function.fn))
    # An interpreted tl.sum would leave triton.language changed.
    for name, combine in (("sum", tl.standard._sum_combine), ("max", tl.standard._elementwise_max)):
        monkeypatch.setattr(
            tl, name, lambda x, axis, combine=combine: interpreter.ReduceOps(axis, combine, False).apply(x)
        )


def _to_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(x)).to(torch.bfloat16).view(torch.uint16).numpy()


def altered(name: str, right: str, wrong: str, folder: Path) -> Any:
    """A copy of a module with a mistake in its source."""
    source = Path(module(name).__file__).read_text()
    assert right in source
    path = folder / f"{name}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"altered.{name}", path)
    assert spec
    assert spec.loader
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


class Launch(NamedTuple):
    """Arguments of one launch of a kernel."""

    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, int]


class Recorder:
    """Kernel that records its launches and computes nothing."""

    def __init__(self, function: Any, launches: list[Launch]) -> None:
        self.function, self.launches = function, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *a, **options: self.launches.append(Launch(self.function, grid, a, options))


def record(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Records the launches of all kernels."""
    launches: list[Launch] = []
    for name, kernels in MODULES.items():
        for kernel in kernels:
            function = getattr(module(name), kernel)
            monkeypatch.setattr(module(name), kernel, Recorder(function, launches))
    return launches


def compile_for_sm90(launch: Launch) -> Any:
    """Compiles the kernel of a launch for an H100 or H200, specialised as the launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(launch.function.arg_names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name], divisible = TYPES[value.dtype], value.storage_offset() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        elif value == 1:
            signature[name], constants[name], divisible = "constexpr", 1, False
        else:
            signature[name], divisible = "i64" if value >= 2**31 else "i32", value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = dict(launch.options)
    for name in launch.function.arg_names[len(launch.arguments) :]:
        signature[name], constants[name] = "constexpr", options.pop(name)
    source = ASTSource(launch.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
