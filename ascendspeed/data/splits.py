"""Which documents or rows are whose: the shares of `--split`, by Megatron's own rounding."""

import re

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split

from ascendspeed.config.schema import DataConfig
from ascendspeed.utils.errors import UserError

SPLITS = tuple(split.name for split in Split)  # train, valid, test


def split_range(split: str, name: str, count: int) -> range:
    """The documents, of `count`, that `--split` gives to the split `name`. Raises `UserError` for what are no shares."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(,(\d+\.?\d*|\.\d+)){0,2}", split) or not any(
        map(float, split.split(","))
    ):
        raise UserError(f"--split {split} is not up to three shares such as 949,50,1")
    share = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[SPLITS.index(name)]
    return range(0) if share is None else range(round(share[0] * count), round(share[1] * count))


def describe_split(data: DataConfig, name: str, chosen: int, count: int, things: str = "documents") -> str:
    """What a split has, for messages: where it has data of its own, no --split is at work."""
    if data.valid_data_path:
        return f"{name} has all of the {count:,} {things}"
    return f"--split {data.split} gives {name} {chosen:,} of {count:,} {things}"
