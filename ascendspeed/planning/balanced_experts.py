"""Mixture of experts in a plan: every expert gets the same number of tokens.

On fake tensors a routing map has no values, so that the shapes behind it would be unknown; on real ones the
map of uninitialized weights would be arbitrary.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from ascendspeed.config.schema import ModelConfig

masked_select = torch.ops.aten.masked_select.default


class SelectedShare(TorchDispatchMode):
    """Gives `masked_select` of fake tensors the number of elements of a balanced routing map."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs an operation, or answers it."""
        if func is masked_select and isinstance(args[1], FakeTensor):
            size = args[1].numel() * self.model.moe_router_topk // self.model.num_experts
            return args[0].new_empty(size)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def balanced(model: ModelConfig) -> Iterator[None]:
    """Inside the block, tokens are divided evenly; nothing changes for a dense model."""
    if model.num_experts is None:
        yield
        return
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher as Dispatcher

    dispatch = _dispatch(Dispatcher.dispatch_postprocess)
    with patch.object(Dispatcher, "dispatch_postprocess", dispatch), SelectedShare(model):
        yield


def _dispatch(original: Callable[..., Any]) -> Callable[..., Any]:
    """`dispatch_postprocess` with a balanced map (real tensors), or balanced counts (fake ones)."""

    def dispatch(self: Any, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(self.routing_map, FakeTensor):
            _balance(self.routing_map, self.router_topk)
            return original(self, hidden_states, probs)
        tokens, _, weights = original(self, hidden_states, probs)
        with unset_fake_temporarily():
            counts = torch.full((self.num_local_experts,), len(tokens) // self.num_local_experts)
            counts[: len(tokens) % self.num_local_experts] += 1
        return tokens, counts, weights

    return dispatch


def _balance(routing_map: Tensor, topk: int) -> None:
    """Sends token t to the experts topk t ... topk t + topk - 1, modulo their number."""
    tokens, experts = routing_map.shape
    chosen = (torch.arange(tokens * topk) % experts).view(tokens, topk)
    routing_map.zero_().scatter_(1, chosen, True)
