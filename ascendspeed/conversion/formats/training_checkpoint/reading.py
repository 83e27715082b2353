"""Reads training checkpoints: the fp32 master weights, with adapters merged into their base."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.conversion import model_card, weights_identity
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, read_config
from ascendspeed.conversion.formats.base import ReadOptions
from ascendspeed.conversion.lora_merge import merge
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import OUTPUT
from ascendspeed.models.lora.adapter import LoraAdapter, LoraPair
from ascendspeed.models.lora.targets import selected_targets
from ascendspeed.models.param_mapping import ShardSpec, Slice2D
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names

OpenReader = Callable[..., CheckpointReader]
"""`registry.open_reader`, which opens base weights of any format."""


def open_training_folder(folder: Path, options: ReadOptions) -> CheckpointReader:
    """Opens and verifies the newest complete step; tokenizer and token ids are those of the run's tokenizer
    folder.
    """
    if options.config_dir != folder:
        raise UserError(
            f"{folder} is a training checkpoint, which knows its model: leave --config out (--tokenizer "
            f"names a tokenizer)"
        )
    readers = options.readers or Readers()
    return reader_of(readers.open(folder), options.open_reader, readers)


def reader_of(
    checkpoint: Checkpoint, open_reader: OpenReader, readers: Readers | None = None
) -> CheckpointReader:
    """Reads an opened checkpoint; adapters are merged into their base weights."""
    if checkpoint.run.lora.lora_rank:
        base = base_of(checkpoint, open_reader, readers=readers)
        return merge(base, adapter_of(checkpoint))
    return full_weights(checkpoint)


def base_of(
    checkpoint: Checkpoint,
    open_reader: OpenReader,
    moved_to: str | None = None,
    readers: Readers | None = None,
) -> CheckpointReader:
    """Opens the base weights of a checkpoint of adapters, at the recorded path or `moved_to`.

    Raises `UserError` if they are missing or are other weights than those that were trained on.
    """
    lora = checkpoint.run.lora
    path = moved_to or lora.lora_base
    if path is None or not Path(path).is_dir():
        raise UserError(
            f"{checkpoint.path} holds adapters of the weights in {path}, which are not there; name their "
            f"folder now: "
            "--lora-base to go on training, tools/lora/merge_lora.py --base for all else"
        )
    base = open_reader(path, readers=readers)
    if weights_identity.sampled(base) != lora.lora_base_fingerprint:
        raise UserError(
            f"{checkpoint.path} holds adapters of other weights than those in {path} (trained on "
            f"{lora.lora_base})"
        )
    return base


def adapter_of(checkpoint: Checkpoint) -> LoraAdapter:
    """The adapters in a training checkpoint, fp32. Raises `UserError` if it has none."""
    model = checkpoint.config
    lora = checkpoint.run.lora
    if not lora.lora_rank:
        raise UserError(
            f"{checkpoint.path} holds all weights of a model, no adapters (it was trained without "
            f"--lora-rank)"
        )
    tensors = dict(checkpoint.tensors())
    pairs = {}
    for layer in range(model.num_layers):
        for target in selected_targets(model, lora):
            a = tensors[target.megatron_name("A", layer)]
            b = tensors[target.megatron_name("B", layer)]
            pairs[target.hf_module.format(l=layer)] = LoraPair(a, b, lora.lora_alpha / lora.lora_rank)
    settings = {
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(lora.lora_target_modules),
    }
    return LoraAdapter(
        checkpoint.path,
        pairs,
        settings,
        lora.lora_base,
        lora.lora_base_fingerprint,
        checkpoint.run.data.chat_template,
        checkpoint.run.data.tokenizer_name_or_path,
        model_card.training_section(checkpoint),
        replaced={FAMILIES[model.family].reward_param: tensors[OUTPUT]} if model.reward_head else {},
        scored_token_id=model.scored_token_id,
    )


def full_weights(checkpoint: Checkpoint, kind: str = "master") -> CheckpointReader:
    """Reads a checkpoint of a whole model: its weights, or their average (`ema`)."""
    shapes = {parameter.name: parameter.shape for parameter in param_mapping.parameters(checkpoint.config)}
    check_names(checkpoint.path, shapes, checkpoint.names(), of="the model of its run.json")
    tokenizer = checkpoint.run.data.tokenizer_name_or_path
    assets_dir = Path(tokenizer) if tokenizer else None
    has_config = assets_dir is not None and (assets_dir / "config.json").is_file()
    config_json = read_config(assets_dir)[0] if has_config else {}

    def read_block(name: str, wanted: Slice2D) -> Tensor:
        shape = shapes[name]
        columns = math.prod(shape[1:])
        flat = checkpoint.read(name, kind, ShardSpec(shape), 0, wanted.row * columns, wanted.rows * columns)
        return flat.view(wanted.rows, columns)[:, wanted.column : wanted.column + wanted.columns]

    return CheckpointReader(
        "training checkpoint",
        checkpoint.path,
        checkpoint.config,
        config_json,
        dict.fromkeys(shapes, torch.float32),
        read_block,
        assets_dir,
        chat_template=checkpoint.run.data.chat_template,
        training_notes=model_card.training_section(checkpoint),
    )
