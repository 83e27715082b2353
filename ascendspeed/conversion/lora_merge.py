"""Merges LoRA adapters into the weights of a checkpoint, bit for bit as peft does."""

from dataclasses import replace

from torch import Tensor

from ascendspeed.conversion import weights_identity
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_factory, full_slice
from ascendspeed.conversion.reward_view import as_reward_model
from ascendspeed.models import param_mapping
from ascendspeed.models.lora.adapter import LoraAdapter, changed_parameters, check_base
from ascendspeed.models.param_mapping import Slice2D


def merge(reader: CheckpointReader, adapter: LoraAdapter) -> CheckpointReader:
    """Returns a reader of the merged weights; each tensor is computed when it is read.

    Each matrix is that of peft's `merge_and_unload`, bit for bit. Raises `UserError` for adapters of another
    model.
    """
    check_base(adapter, reader.path, adapter.fingerprint and weights_identity.sampled(reader))
    if adapter.has_reward_head:
        reader = as_reward_model(reader, adapter.scored_token_id)
    parameters = changed_parameters(adapter, reader.config)

    def merged_parameter(name: str) -> Tensor:
        parameter = parameters[name]
        full = reader.read_block(name, full_slice(parameter))
        matrices = param_mapping.megatron_to_hf(reader.config, parameter, full)
        changed = {hf_name: adapter.applied(hf_name, matrix) for hf_name, matrix in matrices.items()}
        return param_mapping.hf_to_megatron(reader.config, parameter, changed)

    read_merged = from_factory(merged_parameter)

    def read_block(name: str, wanted: Slice2D) -> Tensor:
        return (read_merged if name in parameters else reader.read_block)(name, wanted)

    return replace(
        reader,
        description=f"{reader.description} with adapters",
        read_block=read_block,
        chat_template=adapter.chat_template or reader.chat_template,
        training_notes=adapter.training_notes or reader.training_notes,
    )
