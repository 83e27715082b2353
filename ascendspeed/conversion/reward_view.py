"""Reads a language model as a reward model: its output layer is replaced by a scalar head."""

from dataclasses import replace

import torch
from torch import Tensor

from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import OUTPUT
from ascendspeed.models.param_mapping import Slice2D
from ascendspeed.utils.errors import UserError


def as_reward_model(reader: CheckpointReader, scored_token_id: int | None) -> CheckpointReader:
    """Returns `reader` with a head of zeros, or unchanged if it reads a reward model.

    Raises `UserError` for a family without reward models.
    """
    if reader.config.reward_head:
        return reader
    if FAMILIES[reader.config.family].reward_architecture is None:
        raise UserError(
            f"{reader.path}: models of family {reader.config.family} have no class for reward models"
        )
    config = replace(reader.config, reward_head=True, scored_token_id=scored_token_id)
    other = next(iter(reader.dtypes.values()))
    names = [parameter.name for parameter in param_mapping.parameters(config)]

    def read_block(name: str, wanted: Slice2D) -> Tensor:
        if name == OUTPUT:
            return torch.zeros(wanted.rows, wanted.columns, dtype=other)
        return reader.read_block(name, wanted)

    dtypes = {name: other if name == OUTPUT else reader.dtypes[name] for name in names}
    return replace(reader, config=config, dtypes=dtypes, read_block=read_block)
