"""Complete configuration of a run, and its form in run.json."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from ascendspeed.config.schema.data import DataConfig
from ascendspeed.config.schema.model import ModelConfig
from ascendspeed.config.schema.optim import OptimConfig
from ascendspeed.config.schema.parallel import ParallelConfig
from ascendspeed.config.schema.train import TrainConfig
from ascendspeed.config.schema.tuning import LoraConfig, PreferenceConfig
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class InputRecord:
    """Content of what a run has read, for notes when its checkpoint is continued; no flags set it."""

    data: tuple[str, ...] = ()
    """Hash of each data set of --data-path (`data.dataset.hash_dataset`)."""
    valid_data: tuple[str, ...] = ()
    """Hash of each data set of --valid-data-path."""
    tokenizer: str | None = None
    """Hash of the tokenizer (`tokenization.fingerprint`)."""
    deepspeed_config: str | None = None
    """Content of --deepspeed_config, as JSON."""
    hub: tuple[str, ...] = ()
    """Models that were fetched from a hub, with their commits: internlm/internlm2-7b@COMMIT."""


@dataclass(frozen=True)
class Run:
    """Complete configuration of a training run."""

    model: ModelConfig
    parallel: ParallelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    inputs: InputRecord = field(default_factory=InputRecord)


def to_dict(run: Any) -> dict[str, Any]:
    """Converts a config dataclass to a dictionary for JSON; `from_dict` is the inverse for a `Run`."""
    return dataclasses.asdict(run)


def from_dict(values: dict[str, Any]) -> Run:
    """Builds a `Run` from a dictionary of `to_dict`. Raises `UserError` for unknown or missing keys."""
    groups = {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "optim": OptimConfig,
        "data": DataConfig,
        "train": TrainConfig,
    }
    try:
        parts = {name: _group_from_dict(group, values[name]) for name, group in groups.items()}
        lora = _group_from_dict(LoraConfig, values.get("lora", {}))  # absent in older checkpoints
        inputs = _group_from_dict(InputRecord, values.get("inputs", {}))  # likewise
        preference = _group_from_dict(PreferenceConfig, values.get("preference", {}))  # likewise
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"run.json is not one of this version: {str(error)[:200]}") from error
    return Run(**parts, lora=lora, preference=preference, inputs=inputs)


def _group_from_dict(group: type, values: dict[str, Any]) -> Any:
    """Builds one dataclass of a `Run`. Raises `TypeError` for a key or a type that it does not have."""
    hints = typing.get_type_hints(group)
    for name, value in values.items():
        if name in hints and not _is_of_type(value, hints[name]):
            raise TypeError(f"{name} = {value!r:.80}")
    # JSON turns tuples into lists; no field is a list.
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return group(**values | tuples)


def _is_of_type(value: Any, hint: Any) -> bool:
    """True if a JSON value can be that of a field; choices are compared by type only."""
    origin = typing.get_origin(hint)
    options = typing.get_args(hint)
    if origin is Literal:
        return any(type(value) is type(option) for option in options)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_of_type(item, options[0]) for item in value)
    if options:  # a union
        return any(_is_of_type(value, option) for option in options)
    return type(value) in (int, float) if hint is float else type(value) is hint
