"""A process grid of any size in one process: fake tensors, fake collectives, and answers for what they lack.

Everything that is replaced here is restored at the end. Modules that need Megatron-core are imported inside
the functions, after `distributed.device.prepare`.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from ascendspeed.config.schema import ParallelConfig
from ascendspeed.distributed import process_groups
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.planning import fake_deepspeed

aten = torch.ops.aten

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class KnownValues(TorchDispatchMode):
    """Answers for reading a fake tensor: numbers are 1, flags are false, tensors are equal.

    A loss and a norm are then finite, and nothing is skipped.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs an operation, or answers it."""
        if args and isinstance(args[0], FakeTensor):
            if func is aten._local_scalar_dense.default:
                return _value_of(args[0].dtype)
            if func is aten.equal.default:
                return True
        return func(*args, **(kwargs or {}))


class FiniteValues(TorchDispatchMode):
    """Answers for reading a byte or a fraction of a real tensor, as `KnownValues` does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs an operation, or answers it."""
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            if dtype == torch.uint8 or dtype.is_floating_point:
                return _value_of(dtype)
        return func(*args, **(kwargs or {}))


def _value_of(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0 if dtype == torch.uint8 else 1


@contextlib.contextmanager
def joined(device: Device, parallel: ParallelConfig, world: int, rank: int) -> Iterator[ProcessGrid]:
    """The process grid of rank `rank` of `world` processes, whose collectives do nothing.

    No other process group may exist.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan needs a process without process groups")
    numbers = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    variables = {
        **{name: str(value) for name, value in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    from megatron.core import parallel_state

    create_group = own_groups_only(parallel_state.create_group, rank)
    with patch.dict(os.environ, variables), patch.object(parallel_state, "create_group", create_group):
        dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world)
        try:
            yield process_groups.initialize(device, parallel, seed=1)
        finally:
            process_groups.destroy()


def own_groups_only(create_group: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Megatron-core's `create_group` without the groups of other ranks.

    Their number grows with the world, and this rank never uses them.
    """

    def create(ranks: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        is_own = rank in ranks
        return create_group(ranks, *args, **kwargs) if is_own else dist.GroupMember.NON_GROUP_MEMBER

    return create


@contextlib.contextmanager
def fake_tensors(deepspeed: bool) -> Iterator[None]:
    """Tensors without memory: every operation gives only its shape and type.

    `deepspeed`: also for the DeepSpeed engine, whose import takes seconds.
    """
    with contextlib.ExitStack() as stack:
        for target, name, value in [*_replacements(), *(fake_deepspeed.replacements() if deepspeed else ())]:
            stack.enter_context(patch.object(target, name, value))
        stack.callback(_clear_caches)
        _clear_caches()
        stack.enter_context(warnings.catch_warnings())
        # ZeRO asserts the alignment of its buffers; that of a fake tensor has no meaning.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(KnownValues())
        yield


@contextlib.contextmanager
def real_tensors(deepspeed: bool) -> Iterator[None]:
    """Tensors with memory, whose contents are undefined: no update is skipped for them.

    Weights without a file, and what other ranks would have sent, are uninitialized.
    """
    with contextlib.ExitStack() as stack:
        for target, name, value in fake_deepspeed.finite_gradients() if deepspeed else ():
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(FiniteValues())
        yield


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, replacement) of the functions that need values, or memory, or other processes."""
    import megatron.core.distributed.param_and_grad_buffer as gradient_buffers

    from ascendspeed.training.engines import common, deepspeed, megatron

    yield torch.Tensor, "tolist", _tolist(torch.Tensor.tolist)
    yield torch.Tensor, "type", _type_name(torch.Tensor.type)
    # `.to(device)` and `.bfloat16()` change nothing here, and a fake parameter cannot be exchanged.
    yield torch.nn.Module, "_apply", lambda self, function, recurse=True: self
    yield dist, "all_gather_object", _gather_own
    yield dist, "broadcast_object_list", lambda *args, **kwargs: None
    yield gradient_buffers, "_coalescing_manager", _no_coalescing
    yield common.BaseEngine, "_all_reduce_sum", _sum_of_success
    for module in (deepspeed, megatron):
        yield module, "packed_sequences_of", with_real_tensors(module.packed_sequences_of)


def with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of host tensors that reads their values."""

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call


def _tolist(tolist: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.tolist` that also answers for fake tensors."""

    def values(self: Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return tolist(self)
        nested: Any = _value_of(self.dtype)
        for size in reversed(self.shape):
            nested = [nested] * size
        return nested

    return values


def _type_name(type_: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type` for fake tensors: the name of a real one."""

    def name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_(self, *args, **kwargs)
        with unset_fake_temporarily():
            return type_(torch.empty(0, dtype=self.dtype, device="cpu"))

    return name


def _gather_own(values: list[Any], value: Any, group: Any = None) -> None:
    values[:] = [value] * len(values)


@contextlib.contextmanager
def _no_coalescing(*args: Any, **kwargs: Any) -> Iterator[Any]:
    yield type("Handle", (), {"wait": lambda self: None})()


def _sum_of_success(self: Any, values: Any, group: Any = None) -> Any:
    """One for the first number (a loss, tokens), zero for the others (failures)."""
    return [1.0] + [0.0] * (len(values) - 1) if isinstance(values, list) else 1.0


def _clear_caches() -> None:
    """Drops tensors of another mode that functions have kept."""
    from ascendspeed.models.gpt import attention

    attention.clear_mask_cache()
