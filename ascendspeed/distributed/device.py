"""Device support for CPU, CUDA and Ascend NPU: the only file that adapts torch to a device.

`main()` calls `prepare` before it imports Megatron-core or DeepSpeed. On CUDA it changes nothing; on an NPU
it activates torch_npu's `transfer_to_npu`; on a CPU it redirects the `torch.cuda` calls of Megatron-core to
the CPU.
"""

import functools
import importlib
import importlib.util
import itertools
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._device
from torch import Tensor
from torch.profiler import ProfilerActivity

from ascendspeed.utils.errors import UserError

COLLECTIVE_EVENTS = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel", "hccl:", "hcom_")
"""First words of the events of a collective in a trace: of gloo's threads, or kernels of a device."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
DETERMINISTIC_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree"),
    "HCCL_DETERMINISTIC": ("true", "strict"),
}
"""Variables that libraries read when they start -> values for sums in a fixed order, the default first."""
CANN_HOME = "/usr/local/Ascend/ascend-toolkit/latest"
"""Folder of CANN unless ASCEND_HOME_PATH, which CANN's set_env.sh sets, names another."""
MEGATRON_WARNINGS = (
    "Transformer Engine",
    "Apex",
    "full scope is deprecated",
    "not a leaf Tensor is being accessed",
    r"torch\.distributed\.\w+. is deprecated",
)
"""Warnings of Megatron-core at import and in every run, which are suppressed."""


@dataclass(frozen=True)
class Device:
    """The device of this process."""

    kind: str
    """cpu, cuda or npu."""
    index: int
    """Local number of the device; 0 on a CPU."""
    backend: str
    """Backend of torch.distributed."""
    name: str
    """Hardware name as reported by the driver."""

    @property
    def torch(self) -> torch.device:
        """The torch device."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def fused_adamw(self) -> bool:
        """True if torch has a fused AdamW for this device (one pass over memory instead of about ten)."""
        return self.kind != "npu"

    @property
    def compiles_triton(self) -> bool:
        """True if Triton kernels are compiled for this device."""
        return self.kind == "cuda"

    @property
    def has_sdpa_backends(self) -> bool:
        """True if torch's attention has several fused backends to choose from."""
        return self.kind == "cuda"

    @property
    def has_graphs(self) -> bool:
        """True if kernels can be recorded and launched together. Not on an NPU: its kernel over a paged cache
        takes lengths from Python."""
        return self.kind == "cuda"

    @property
    def has_fp8_products(self) -> bool:
        """True if the device multiplies matrices in fp8."""
        return self.kind == "cuda" and torch.cuda.get_device_capability(self.index) >= (8, 9)

    @property
    def reduces_fp64(self) -> bool:
        """True if the device's collectives can sum fp64; hccl refuses it before Ascend 950."""
        return self.kind != "npu"

    def copy(self, tensor: Tensor) -> Tensor:
        """Copies a tensor from the host; on CUDA through pinned memory, without waiting for the device."""
        if self.kind == "cuda":
            return tensor.pin_memory().to(self.torch, non_blocking=True)
        return tensor.to(self.torch)

    def peak_memory(self) -> int:
        """Peak memory in bytes: of the device's allocator, or of the process on a CPU."""
        if self.kind == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return getattr(torch, self.kind).max_memory_allocated()

    @property
    def has_memory_history(self) -> bool:
        """True if the allocator of the device can record its history."""
        return self.kind == "cuda"

    def record_memory_history(self) -> None:
        """Begins to record allocations with their stacks."""
        torch.cuda.memory._record_memory_history()

    def dump_memory_history(self, path: str) -> None:
        """Writes the recorded allocations for pytorch.org/memory_viz."""
        torch.cuda.memory._dump_snapshot(path)

    @property
    def profiler_activities(self) -> list[ProfilerActivity]:
        """Activities that torch.profiler records: of the CPU, and of the device."""
        names = {"cuda": ["CUDA"], "npu": ["PrivateUse1"]}.get(self.kind, [])
        return [getattr(ProfilerActivity, name) for name in ("CPU", *names)]

    def synchronize(self) -> None:
        """Waits until the device has finished all queued work."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()

    def empty_cache(self) -> None:
        """Releases cached memory of the allocator."""
        if self.kind != "cpu":
            getattr(torch, self.kind).empty_cache()


def suppress_megatron_warnings() -> None:
    """Ignores what Megatron-core warns about; before it is imported where no device is prepared."""
    for text in MEGATRON_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}")


def prepare(choice: str = "auto", backend: str = "auto", deterministic: bool = False) -> Device:
    """Chooses the device and adapts torch to it; once per process, before megatron.core is imported.

    `backend` "nccl" or "hccl" means the device's own backend; "gloo" means gloo. Raises `UserError` if the
    requested device is not available, or if `deterministic` contradicts the environment.
    """
    if deterministic:
        _make_deterministic()
    suppress_megatron_warnings()
    kind = choose(choice)
    index = 0 if kind == "cpu" else int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "npu":
        # Takes effect on import: torch.cuda and nccl become npu and hccl, but not the names of tensor types.
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        _name_types_as_cuda("torch.npu.")
        os.environ.setdefault("ASCEND_HOME_PATH", CANN_HOME)  # DeepSpeed ends with a KeyError without it
    if kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed detects the hardware itself
        _redirect_cuda_to_cpu()
    else:
        if os.environ.get("DS_ACCELERATOR") == "cpu":  # set by the launcher, which looked for device files
            del os.environ["DS_ACCELERATOR"]
        count = getattr(torch, kind).device_count()
        if index >= count:
            raise UserError(
                f"local rank {index} has no {kind} device: this machine shows {count}; "
                "start fewer processes per node"
            )
        getattr(torch, kind).set_device(index)
    import_uncompiled("megatron.core.jit", kind)  # which keeps the decorator for modules imported later
    if kind == "cpu":
        name = cpu_info().get("model name", "CPU")
    else:
        name = getattr(torch, kind).get_device_name(index)
    return Device(kind, index, "gloo" if backend == "gloo" else BACKENDS[kind], name)


def import_uncompiled(module: str, kind: str) -> None:
    """Imports a module some functions of which are decorated by `torch.compile`, without compiling them.

    The decorator itself loads torch's compiler, half of the time of a start, and most models call none of
    them. On CUDA they are compiled when they are first called. Elsewhere they run as they are written: on a
    CPU the compiler would need one of C++, and for an NPU torch has none.
    """
    if module in sys.modules:
        return
    original = torch.compile
    torch.compile = _compile_on_first_call if kind == "cuda" else _leave_uncompiled
    try:
        importlib.import_module(module)
    finally:
        torch.compile = original


def _leave_uncompiled(function: Callable | None = None, **settings: Any) -> Callable:
    """Decorator in place of `torch.compile`."""
    return _leave_uncompiled if function is None else function


def _compile_on_first_call(function: Callable | None = None, **settings: Any) -> Callable:
    """Decorator in place of `torch.compile`."""
    if function is None:
        return functools.partial(_compile_on_first_call, **settings)
    compiled: list[Callable] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **settings))
        return compiled[0](*args, **kwargs)

    return call


def _make_deterministic() -> None:
    """Selects kernels and collectives that sum in a fixed order; an operation without such a kernel raises.

    torch's flash attention then has a deterministic backward pass, and its cuDNN attention is not used.
    """
    for name, values in DETERMINISTIC_VARIABLES.items():
        value = os.environ.setdefault(name, values[0])
        if value not in values:
            choices = " or ".join(values)
            raise UserError(f"--deterministic: {name}={value}; unset it, or set it to {choices}")
    torch.use_deterministic_algorithms(True)
    # Memory that is written before it is read need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def choose(choice: str) -> str:
    """The kind of device that `choice` selects here: npu, cuda or cpu.

    Raises `UserError` if the requested device is not available.
    """
    available = {
        "npu": importlib.util.find_spec("torch_npu") is not None,
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    if available["npu"] and choice in ("auto", "npu"):
        importlib.import_module("torch_npu")  # defines torch.npu
        available["npu"] = torch.npu.is_available()
    if choice == "auto":
        return next(kind for kind, is_available in available.items() if is_available)
    if not available[choice]:
        seen = ", ".join(kind for kind, is_available in available.items() if is_available)
        raise UserError(f"--device {choice}: no such device here (torch {torch.__version__} sees: {seen})")
    return choice


def cpu_info() -> dict[str, str]:
    """Entries of the first processor in /proc/cpuinfo: `model name`, `vendor_id`, `flags`; not all of them on
    every architecture."""
    with open("/proc/cpuinfo") as lines:
        pairs = (line.partition(":") for line in itertools.takewhile(str.strip, lines))
        return {key.strip(): value.strip() for key, _, value in pairs}


@functools.cache
def _redirect_cuda_to_cpu() -> None:
    """Redirects the `torch.cuda` calls of Megatron-core (rope, RNG tracker, p2p, gradient buffers, clipping)
    to the CPU."""
    cpu, cuda, tensor = torch.device("cpu"), torch.cuda, torch.Tensor
    cuda.current_device = lambda: cpu
    cuda.synchronize = cuda.empty_cache = lambda *_, **__: None
    # One generator serves as the CPU's and the accelerator's. `_lazy_call` would queue the RNG tracker's
    # set_state forever.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = {cpu: torch.default_generator}
    cuda._lazy_call = lambda function, **_: function()
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda r: "CPU RNG state changed" not in r.getMessage()
    )
    tensor.cuda = lambda self, *_, **__: self
    _name_types_as_cuda("torch.")
    # `with torch.device(...)` identifies constructors by a set that is built on first use: build it before
    # they are replaced.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


@functools.cache
def _name_types_as_cuda(prefix: str) -> None:
    """Makes `Tensor.type()` say "torch.cuda.FloatTensor" for "`prefix`FloatTensor".

    Megatron-core's optimizers and its clipping accept only parameters whose type is a name of torch.cuda.
    """
    type_ = torch.Tensor.type
    torch.Tensor.type = lambda self, *a, **k: (
        type_(self, *a, **k) if a or k else type_(self).replace(prefix, "torch.cuda.", 1)
    )


def _on_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return constructor(*args, **kwargs)

    return construct


def use_host_cores(device: Device) -> int:
    """Gives torch's operations on the host this rank's share of the cores, for work that is offloaded to it.

    Returns the number of threads. Where the CPU is the device, it stays as it is.
    """
    if device.kind != "cpu":
        share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(torch.get_num_threads(), share))
    return torch.get_num_threads()


def current_device() -> torch.device:
    """The device of this process's tensors; call after `prepare`."""
    device = torch.cuda.current_device()  # works for every kind after `prepare`
    return device if isinstance(device, torch.device) else torch.device("cuda", device)


def rng_state() -> torch.Tensor:
    """State of the device's random number generator."""
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restores the state that `rng_state` returned."""
    torch.cuda.set_rng_state(state)
