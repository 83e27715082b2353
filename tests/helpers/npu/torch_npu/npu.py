"""Module `torch.npu` of the stand-in: every public name of torch_npu's, of which the called ones work."""

import functools
import types
from typing import Any

import torch

PUBLIC = """
BFloat16Storage BFloat16Tensor BoolStorage BoolTensor ByteStorage ByteTensor CharTensor CubeMathType
DoubleStorage DoubleTensor Event ExternalEvent ExternalStream FloatStorage FloatTensor HalfStorage HalfTensor
IntStorage IntTensor LongStorage LongTensor MemPool NPUGraph NPUPluggableAllocator ShortTensor Stream
StreamContext SyncLaunchStream caching_allocator_alloc caching_allocator_delete can_device_access_peer
change_current_allocator current_blas_handle current_device current_stream default_stream device device_count
device_of empty_cache get_allocator_backend get_device_capability get_device_name get_device_properties
get_per_process_memory_fraction get_rng_state get_rng_state_all get_sync_debug_mode graph graph_pool_handle
host_memory_stats init initial_seed ipc_collect is_available is_bf16_supported is_current_stream_capturing
is_initialized make_graphed_callables manual_seed manual_seed_all max_memory_allocated max_memory_cached
max_memory_reserved mem_get_info memory_allocated memory_cached memory_reserved memory_snapshot memory_stats
memory_summary reset_accumulated_memory_stats reset_max_memory_allocated reset_max_memory_cached
reset_peak_memory_stats seed seed_all set_device set_per_process_memory_fraction set_rng_state
set_rng_state_all set_stream set_sync_debug_mode stream synchronize use_mem_pool utilization
"""
NAMES = PUBLIC.split()
"""`torch_npu.npu.__all__` of the wheel, without the names that torch.cuda never has."""


class Stream:
    """A queue that is always empty."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Does nothing."""

    def wait_stream(self, stream: "Stream") -> None:
        """Does nothing."""

    def wait_event(self, event: Any) -> None:
        """Does nothing."""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    """A moment that has passed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""

    def wait(self, stream: Stream | None = None) -> None:
        """Does nothing."""

    def query(self) -> bool:
        """True: it has passed."""
        return True


def _tensor_of(dtype: torch.dtype) -> Any:
    return lambda values: torch.tensor(values, dtype=dtype)


IMPLEMENTED: dict[str, Any] = {
    "Stream": Stream,
    "Event": Event,
    "stream": lambda stream: stream or Stream(),
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "init": lambda: None,
    "device_count": lambda: 8,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "Ascend 910 stand-in",
    "get_device_capability": lambda device=None: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "memory_cached": lambda device=None: 0,
    "max_memory_cached": lambda device=None: 0,
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda device=None: None,
    "reset_max_memory_allocated": lambda device=None: None,
    "reset_max_memory_cached": lambda device=None: None,
    "get_device_properties": lambda device=None: types.SimpleNamespace(
        total_memory=64 << 30, name="stand-in"
    ),
    "mem_get_info": lambda device=None: (64 << 30, 64 << 30),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
    "initial_seed": torch.initial_seed,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "ByteTensor": _tensor_of(torch.uint8),
    "IntTensor": _tensor_of(torch.int32),
    "LongTensor": _tensor_of(torch.int64),
    "FloatTensor": _tensor_of(torch.float32),
    "HalfTensor": _tensor_of(torch.float16),
    "BFloat16Tensor": _tensor_of(torch.bfloat16),
}


def module() -> types.ModuleType:
    """The module; a public name that the stand-in does not implement fails when it is called."""
    npu = types.ModuleType("torch.npu")
    for name in NAMES:
        function = IMPLEMENTED.get(name, functools.partial(_missing, name))
        setattr(
            npu, name, function if isinstance(function, type) else _recorded(f"torch.npu.{name}", function)
        )
    npu.default_generators = (torch.default_generator,)  # type: ignore[attr-defined]
    npu._lazy_call = _recorded("torch.npu._lazy_call", lambda call: call())  # type: ignore[attr-defined]
    npu.npurt = lambda: None  # type: ignore[attr-defined]
    npu.__all__ = NAMES  # type: ignore[attr-defined]
    return npu


def _recorded(name: str, function: Any) -> Any:
    from torch_npu import CALLS

    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return function(*args, **kwargs)

    return call


def _missing(name: str, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(f"the stand-in of torch.npu has no {name}")
