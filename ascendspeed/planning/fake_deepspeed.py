"""Replacements for DeepSpeed's functions that compare ranks or look at the memory of this machine."""

import importlib
from collections.abc import Iterator
from typing import Any

PARTITIONED = ("stage3", "partition_parameters", "partitioned_param_coordinator")
"""Modules of `deepspeed.runtime.zero` that compare lists of numbers between ranks."""
PLENTY = 1 << 60


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, replacement); call after the device has been prepared."""
    for name in PARTITIONED:
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        yield module, "assert_ints_same_as_other_ranks", lambda ints: None
    accelerator = importlib.import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator
    # With little free memory ZeRO would build its flat buffers elsewhere.
    yield accelerator, "available_memory", lambda self, device_index=None: PLENTY
