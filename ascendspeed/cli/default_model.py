"""Note about the architecture of a training command that names none."""

from dataclasses import fields
from typing import Any

from ascendspeed.cli.command import CommandLine
from ascendspeed.cli.train_args import DEFAULT_MODEL
from ascendspeed.config.schema import ModelConfig

MODEL_FIELDS = frozenset(f.name for f in fields(ModelConfig))


def note_of_default_model(line: CommandLine[Any]) -> list[str]:
    """Names the architecture if nothing on the command line does."""
    options = line.options
    is_given = options.preset.model or options.train.load or MODEL_FIELDS & line.typed
    return [] if is_given else [f"neither --model nor --load is given: the model is {DEFAULT_MODEL}"]
