"""Replacements for DeepSpeed's functions that compare ranks or look at the memory of this machine."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch

PARTITIONED = ("stage3", "partition_parameters", "partitioned_param_coordinator")
"""Modules of `deepspeed.runtime.zero` that compare lists of numbers between ranks."""
CHECKED = ("stage3", "stage_1_and_2")
"""Modules of `deepspeed.runtime.zero` that look for gradients which are not finite."""
PLENTY = 1 << 60


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, replacement); call after the device has been prepared."""
    for name in PARTITIONED:
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        yield module, "assert_ints_same_as_other_ranks", lambda ints: None
    accelerator = importlib.import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator
    # With little free memory ZeRO would build its flat buffers elsewhere.
    yield accelerator, "available_memory", lambda self, device_index=None: PLENTY


def finite_gradients() -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, replacement): no gradient is refused; for real tensors without contents."""
    for name in CHECKED:
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        yield module, "has_inf_or_nan", lambda x: x.new_zeros((), dtype=torch.bool)
        yield module, "is_invalid_grad_norm", lambda norm: False
