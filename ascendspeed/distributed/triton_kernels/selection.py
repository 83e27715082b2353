"""Selection of Triton kernels by --triton-kernels and the device, with a first launch as a test."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from ascendspeed.distributed.device import Device
from ascendspeed.utils.errors import UserError

OPERATIONS = ("swiglu", "rotary", "cross_entropy")
"""Operations of `Kernels` with a Triton kernel; a module of this package each."""


def select(device: Device, choice: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Kernel of every chosen operation, and the reason if a device that compiles Triton has none.

    `choice`: "auto" (all of them, where they run), "off", or operations. Raises `UserError` if an operation
    that is named cannot have its kernel here.
    """
    if tuple(choice) in ((), ("off",)):
        return {}, ""
    is_auto = tuple(choice) == ("auto",)
    if not device.compiles_triton and is_auto:
        return {}, ""
    problem = _problem(device) if device.compiles_triton else f"Triton does not compile for a {device.kind}"
    if problem and not is_auto:
        raise UserError(
            f"--triton-kernels {' '.join(choice)}: {problem}; give auto, which takes torch's then, or off"
        )
    return {} if problem else {name: kernel(name) for name in (OPERATIONS if is_auto else choice)}, problem


def kernel(operation: str) -> Any:
    """The Triton kernel of an operation; imports triton."""
    return getattr(importlib.import_module(f"ascendspeed.distributed.triton_kernels.{operation}"), operation)


def _problem(device: Device) -> str:
    """Reason why no kernel runs on the device, in one line; empty if one was compiled and launched, which
    takes a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        kernel("swiglu")(torch.zeros(1, 2, device=device.torch))
        device.synchronize()
    except Exception as error:  # of the driver, of the compiler, of the import
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:120]}"
    return ""
