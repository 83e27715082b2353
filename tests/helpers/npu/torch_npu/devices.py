"""Devices of the stand-in: what is meant for "npu" is computed on the CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
WHITE_LISTS = """
logspace randint hann_window rand full_like ones_like rand_like randperm arange frombuffer normal
empty_strided empty_like scalar_tensor tril_indices ones randn tensor triu_indices as_tensor zeros
randint_like full eye empty zeros_like range randn_like linspace _pin_memory load new_empty
new_empty_strided new_full new_ones new_tensor new_zeros to pin_memory to_empty
"""
TRANSFERRED = set(WHITE_LISTS.split())
"""Functions whose "cuda" transfer_to_npu turns into "npu" (its white lists); others fail, as on an NPU."""


def _on_cpu(value: Any, function: str) -> Any:
    kind = value.type if isinstance(value, torch.device) else value
    if isinstance(kind, str) and kind.partition(":")[0] in ("npu", "cuda"):
        if "cuda" in kind and function not in TRANSFERRED:
            raise RuntimeError(f"{function}(device={value}): transfer_to_npu leaves this function alone")
        return CPU
    return value


class OnCPU(TorchFunctionMode):
    """Replaces the device of every call; an integer is a device where torch takes it as one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if "device" in kwargs:
            is_number = isinstance(kwargs["device"], int)
            kwargs["device"] = CPU if is_number else _on_cpu(kwargs["device"], name)
        kwargs.pop("pin_memory", None)
        if name == "pin_memory":
            return args[0]
        if name == "backward":
            return _backward(*args, **kwargs)
        if name in TRANSFERRED:
            args = [_on_cpu(value, name) for value in args]
        return function(*args, **kwargs)


def _backward(
    tensors: Any,
    gradients: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
    **named: Any,
) -> None:
    """`torch.autograd.backward` and `Tensor.backward`, which would run their hooks without the mode."""
    gradients = named.get("gradient", named.get("grad_tensors", gradients))
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    gradients = (gradients,) if gradients is None or isinstance(gradients, torch.Tensor) else tuple(gradients)
    filled = torch.autograd._make_grads(tensors, gradients, is_grads_batched=False)
    with OnCPU():
        torch.autograd.graph._engine_run_backward(
            tensors,
            filled,
            create_graph if retain_graph is None else retain_graph,
            create_graph,
            tuple(inputs or ()),
            allow_unreachable=True,
            accumulate_grad=True,
        )


def install() -> None:
    """Switches the replacement on for the rest of the process."""
    OnCPU().__enter__()
    torch.Tensor.npu = lambda self, *_, **__: self  # type: ignore[attr-defined]
    torch._C._get_accelerator = lambda *_: CPU
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
    torch.Tensor.is_npu = False  # type: ignore[attr-defined]
