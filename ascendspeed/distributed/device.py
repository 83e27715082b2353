"""CPU, CUDA or Ascend NPU: the only file that names a device, and the only place where torch is adapted to one.

`prepare` is called by `main()` before Megatron-core or DeepSpeed is imported. On CUDA it changes nothing; on an NPU it hands over
to torch_npu's own `transfer_to_npu`; on a CPU it makes the `torch.cuda` of which Megatron-core speaks mean the CPU.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import os
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._device

from ascendspeed.utils.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Device:
    """The device of this process."""

    kind: str
    """cpu, cuda or npu."""
    index: int
    """Local number of the device; 0 on a CPU."""
    backend: str
    """Of torch.distributed."""
    name: str
    """Of the hardware, as the driver gives it."""

    @property
    def torch(self) -> torch.device:
        """The torch device."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def fused_adamw(self) -> bool:
        """Whether torch has AdamW as one pass over the memory here, instead of some ten."""
        return self.kind != "npu"

    def peak_memory(self) -> int:
        """Peak bytes in use: of the device's allocator, or of the process on a CPU."""
        if self.kind == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return getattr(torch, self.kind).max_memory_allocated()

    def synchronize(self) -> None:
        """Waits for the device's queue."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()

    def empty_cache(self) -> None:
        """Gives memory back that the allocator keeps for later."""
        if self.kind != "cpu":
            getattr(torch, self.kind).empty_cache()


def prepare(choice: str = "auto", backend: str = "auto") -> Device:
    """Chooses the device and adapts torch to it; once per process, before megatron.core is imported.

    `backend` "nccl" or "hccl" in a recipe means the device's own; "gloo" is taken at its word. Raises `UserError` when the device
    that was asked for is not there.
    """
    said = ("Transformer Engine", "Apex", "full scope is deprecated", "not a leaf Tensor is being accessed")
    for text in (
        *said,
        r"torch\.distributed\.\w+. is deprecated",
    ):  # by Megatron-core, at import and in every run
        warnings.filterwarnings("ignore", message=f".*{text}")
    kind = _choose(choice)
    index = 0 if kind == "cpu" else int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "npu":
        importlib.import_module(
            "torch_npu.contrib.transfer_to_npu"
        )  # acts on import: torch.cuda and nccl become npu and hccl
    if kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would otherwise look for the hardware by itself
        _cuda_is_cpu()
    else:
        count = getattr(torch, kind).device_count()
        if index >= count:
            raise UserError(
                f"local rank {index} has no {kind} device: this machine shows {count}; start fewer processes per node"
            )
        getattr(torch, kind).set_device(index)
    name = _cpu_name() if kind == "cpu" else getattr(torch, kind).get_device_name(index)
    return Device(kind, index, "gloo" if backend == "gloo" else BACKENDS[kind], name)


def _choose(choice: str) -> str:
    there = {
        "npu": importlib.util.find_spec("torch_npu") is not None,
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    if there["npu"] and choice in ("auto", "npu"):
        importlib.import_module("torch_npu")  # gives torch its `npu`
        there["npu"] = torch.npu.is_available()
    if choice == "auto":
        return next(kind for kind, is_there in there.items() if is_there)
    if not there[choice]:
        here = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise UserError(f"--device {choice}: no such device here (torch {torch.__version__} sees: {here})")
    return choice


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        return next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU"
        )


@functools.cache
def _cuda_is_cpu() -> None:
    """Answers on the CPU the `torch.cuda` calls that Megatron-core makes (rope, RNG tracker, p2p, gradient buffers, clipping)."""
    cpu, cuda, tensor = torch.device("cpu"), torch.cuda, torch.Tensor
    cuda.current_device = lambda: cpu
    cuda.synchronize = cuda.empty_cache = lambda *_, **__: None
    # One generator plays both the CPU's and the accelerator's. `_lazy_call` would queue the RNG tracker's set_state for ever.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = {cpu: torch.default_generator}
    cuda._lazy_call = lambda function, **_: function()
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda r: "CPU RNG state changed" not in r.getMessage()
    )
    tensor.cuda = lambda self, *_, **__: self
    type_ = tensor.type  # megatron-core compares param.type() with 'torch.cuda.FloatTensor'
    tensor.type = lambda self, *a, **k: (
        type_(self, *a, **k) if a or k else type_(self).replace("torch.", "torch.cuda.", 1)
    )
    # `with torch.device(...)` knows constructors by identity, in a set made on first use: made now, it holds the real ones.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return make(*args, **kwargs)

    return made


def current_device() -> torch.device:
    """The device on which this process builds its tensors; after `prepare`."""
    here = torch.cuda.current_device()  # answered for every kind after `prepare`
    return here if isinstance(here, torch.device) else torch.device("cuda", here)


def rng_state() -> torch.Tensor:
    """State of the device's random number generator."""
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Sets what `rng_state` gave."""
    torch.cuda.set_rng_state(state)


@dataclass(frozen=True)
class FusedKernel:
    """A fused kernel that the device offers."""

    source: str
    """Package and function, for the log."""
    call: Callable[..., Any]


class SequenceBounds(NamedTuple):
    """Where sequences that lie one after the other begin and end."""

    ends: list[int]
    """Of every sequence; the last one is the number of tokens."""
    cumulative: torch.Tensor
    """int32 [sequences + 1] on the device: 0, then the ends."""
    longest: int
    """Tokens of the longest sequence."""


def fused_kernel(device: Device, operation: str) -> FusedKernel | None:
    """The device's fused kernel for one of these, if one is installed; x is [s, b, ...]:

    - `rms_norm(x, weight, eps)`;
    - `rotary(x, cos, sin)`: x [s, b, heads, d], cos and sin [s, 1 or b, 1, d];
    - `swiglu(x)`: x is [gate; up] in the last dimension;
    - `varlen(q, k, v, bounds)`: causal attention within each of many sequences, in bf16 or fp16, d a multiple of 8 up to 256;
      q [tokens, heads, d], k and v [tokens, groups, d].
    """
    maker = {"npu": _fused_npu, "cuda": _fused_cuda}.get(device.kind)
    return maker(operation) if maker else None


def _fused_npu(operation: str) -> FusedKernel | None:
    npu = importlib.import_module("torch_npu")
    if operation == "varlen":
        return FusedKernel(
            "torch_npu.npu_fusion_attention", functools.partial(_varlen_npu, npu.npu_fusion_attention)
        )
    return {
        "rms_norm": FusedKernel(
            "torch_npu.npu_rms_norm", lambda x, weight, eps: npu.npu_rms_norm(x, weight, epsilon=eps)[0]
        ),
        "rotary": FusedKernel(
            "torch_npu.npu_rotary_mul", lambda x, cos, sin: npu.npu_rotary_mul(x, cos, sin)
        ),
        "swiglu": FusedKernel("torch_npu.npu_swiglu", lambda x: npu.npu_swiglu(x, dim=-1)),
    }[operation]


def _fused_cuda(operation: str) -> FusedKernel | None:
    """Liger's kernels, else Apex's RMSNorm; flash-attention's, else torch's own copy of it.

    No rotary: Liger's wants [b, heads, s, d] and turns q and k at once.
    """
    if operation == "varlen":
        return _varlen_cuda()
    if importlib.util.find_spec("liger_kernel") and operation == "rms_norm":
        norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return FusedKernel(
            "liger_kernel.ops.rms_norm",
            lambda x, weight, eps: norm.apply(x, weight, eps, 0.0, "llama", False),
        )
    if importlib.util.find_spec("liger_kernel") and operation == "swiglu":
        glu = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return FusedKernel(
            "liger_kernel.ops.swiglu", lambda x: glu.apply(*(half.contiguous() for half in x.chunk(2, -1)))
        )
    if importlib.util.find_spec("apex") and operation == "rms_norm":
        affine = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
        return FusedKernel(
            "apex.fused_rms_norm_affine", lambda x, weight, eps: affine(x, weight, weight.shape, eps)
        )
    return None


def _varlen_cuda() -> FusedKernel | None:
    if importlib.util.find_spec("flash_attn"):
        flash = importlib.import_module("flash_attn").flash_attn_varlen_func
        return FusedKernel(
            "flash_attn.flash_attn_varlen_func",
            functools.partial(_varlen_flash, flash, {"causal": True}, True),
        )
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        takes = inspect.signature(varlen).parameters  # they changed from version to version
        words: dict[str, Any] = {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
        if "enable_gqa" in takes:
            words["enable_gqa"] = True
        return FusedKernel(
            "torch.nn.attention.varlen",
            functools.partial(_varlen_flash, varlen, words, "enable_gqa" in takes),
        )
    return None


def _varlen_flash(
    kernel: Callable,
    words: dict[str, Any],
    groups: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: SequenceBounds,
) -> torch.Tensor:
    """`groups`: whether the kernel takes fewer heads of keys than of queries."""
    if not groups:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    return kernel(q, k, v, bounds.cumulative, bounds.cumulative, bounds.longest, bounds.longest, **words)


def _varlen_npu(
    kernel: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SequenceBounds
) -> torch.Tensor:
    return kernel(
        *(q, k, v, q.size(1), "TND"),
        atten_mask=_upper(
            2048, q.device
        ),  # this size, whatever the lengths: mode 3 is causal, each sequence by its own end
        sparse_mode=3,
        scale=q.size(-1) ** -0.5,
        actual_seq_qlen=bounds.ends,
        actual_seq_kvlen=bounds.ends,
    )[0]


@functools.lru_cache(1)
def _upper(size: int, device: torch.device) -> torch.Tensor:
    """What is not seen: bool [size, size]."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
