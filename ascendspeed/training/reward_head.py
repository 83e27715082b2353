"""Head of a reward model at the start of a run: that of the loaded weights, or a new one."""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain

from torch import Tensor

from ascendspeed.config.schema import ModelConfig, Run
from ascendspeed.models.families.base import OUTPUT
from ascendspeed.models.lora.adapter import LoraAdapter
from ascendspeed.models.param_mapping import parameters, random_tensor
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, Tensor]]
"""(Megatron name, full tensor) pairs."""


def with_head(run: Run, tensors: Tensors, source: ModelConfig) -> Tensors:
    """Weights of `source`, with a random scalar head if the run trains a reward model and they have none."""
    if not run.model.reward_head or source.reward_head:
        return tensors
    head = next(parameter for parameter in parameters(run.model) if parameter.name == OUTPUT)
    others = (named for named in tensors if named[0] != OUTPUT)
    return chain(others, [(OUTPUT, random_tensor(run.model, head, run.train.seed))])


def head_of(adapter: LoraAdapter, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields the head that was trained beside adapters, if there is one. Raises `UserError` unless it
    fits."""
    if adapter.has_reward_head and not model.reward_head:
        raise UserError(f"{adapter.path} holds the head of a reward model; add --stage rm")
    for head in adapter.replaced.values():
        if tuple(head.shape) != (1, model.hidden_size):
            raise UserError(f"{adapter.path}: its head is {list(head.shape)}, not [1, {model.hidden_size}]")
        yield OUTPUT, head.float()


def with_new_head(run: Run, tensors: Tensors, source: ModelConfig) -> Tensors:
    """`with_head`, and a line in the log if the head is new."""
    if run.model.reward_head and not source.reward_head:
        logger.info(f"reward model: its head is new, from seed {run.train.seed}")
    return with_head(run, tensors, source)
