"""Splits: the part of the documents or rows that `--split` gives to train, valid and test, by Megatron's
rounding."""

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
    """Returns the range of `count` documents that `--split` gives to the split `name`. Raises `UserError` for
    a wrong value."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(,(\d+\.?\d*|\.\d+)){0,2}", split) or not any(
        map(float, split.split(","))
    ):
        raise UserError(f"--split {split} is not up to three shares such as 949,50,1")
    share = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[SPLITS.index(name)]
    return range(0) if share is None else range(round(share[0] * count), round(share[1] * count))


def describe_split(data: DataConfig, name: str, selected: int, count: int, noun: str = "documents") -> str:
    """Describes the size of a split for messages; `--split` is unused if validation data have a path of their
    own."""
    if data.valid_data_path:
        return f"{name} has all of the {count:,} {noun}"
    return f"--split {data.split} gives {name} {selected:,} of {count:,} {noun}"
