"""Configuration of a run: frozen dataclasses, saved in every checkpoint as run.json. No torch, no file
access.

The docstring under a field is its `--help` text, and its name is its flag (`num_layers` -> `--num-layers`);
`cli.parser` parses them.
"""

from ascendspeed.config.schema.choices import (
    MOCK_DATA,
    BackendChoice,
    CpuLinearChoice,
    DeviceChoice,
    KVCacheChoice,
    QuantizationChoice,
    alias,
)
from ascendspeed.config.schema.data import DataConfig
from ascendspeed.config.schema.model import TRAINING_FIELDS, ModelConfig
from ascendspeed.config.schema.optim import OptimConfig
from ascendspeed.config.schema.parallel import ParallelConfig, check_tensor_parallel, padded_vocab_size
from ascendspeed.config.schema.run import InputRecord, Run, from_dict, to_dict
from ascendspeed.config.schema.train import TrainConfig
from ascendspeed.config.schema.tuning import NF4_BLOCK, REFERENCE_LOSSES, LoraConfig, PreferenceConfig

__all__ = [
    "MOCK_DATA",
    "NF4_BLOCK",
    "REFERENCE_LOSSES",
    "TRAINING_FIELDS",
    "BackendChoice",
    "CpuLinearChoice",
    "DataConfig",
    "DeviceChoice",
    "InputRecord",
    "KVCacheChoice",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "QuantizationChoice",
    "Run",
    "TrainConfig",
    "alias",
    "check_tensor_parallel",
    "from_dict",
    "padded_vocab_size",
    "to_dict",
]
