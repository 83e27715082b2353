"""Shapes of the Hugging Face tensors of a model, from its parameter mappings."""

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import param_mapping


def hf_shapes(config: ModelConfig, parameter: param_mapping.Parameter) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every Hugging Face tensor of one parameter."""
    return {entry.name: entry.shape for entry in param_mapping.stored_tensors(config, parameter)}
