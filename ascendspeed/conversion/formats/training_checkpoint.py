"""Our own training checkpoint as a source: the fp32 masters."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, check_names, read_config
from ascendspeed.conversion.lora_adapter import merged, of_checkpoint
from ascendspeed.models import param_mapping
from ascendspeed.models.param_mapping import ShardSpec, Slice2D
from ascendspeed.utils.errors import UserError


def is_one(folder: Path) -> bool:
    """Whether a folder holds, or is, a training checkpoint."""
    return looks_like_checkpoint(folder)


def open_folder(folder: Path, config: Path, readers: Readers | None = None) -> CheckpointReader:
    """The newest good checkpoint in a folder, verified; tokenizer and token ids are those of the run's tokenizer folder.

    Of a checkpoint of adapters these are in the weights that they belong to.
    """
    if config != folder:
        raise UserError(
            f"{folder} is a training checkpoint, which knows its model: leave --config out (--tokenizer names a tokenizer)"
        )
    readers = readers or Readers()
    return source_of(readers.open(folder), readers)


def source_of(opened: Checkpoint, readers: Readers | None = None) -> CheckpointReader:
    """An opened checkpoint as a source."""
    return (
        merged(base_of(opened, readers=readers), of_checkpoint(opened))
        if opened.run.lora.lora_rank
        else _whole(opened)
    )


def base_of(
    opened: Checkpoint, moved_to: str | None = None, readers: Readers | None = None
) -> CheckpointReader:
    """The weights that a checkpoint's adapters belong to, which lie where they lay or were `moved_to`. Raises `UserError`.

    `readers`: as in `formats.open_reader`.
    """
    from ascendspeed.conversion.formats.registry import open_reader

    lora = opened.run.lora
    where = moved_to or lora.lora_base
    if where is None or not Path(where).is_dir():
        lost = f"{opened.path} holds adapters of the weights in {where}, which are not there"
        raise UserError(
            f"{lost}; name their folder now: --lora-base to go on training, tools/lora/merge_lora.py --base for all else"
        )
    source = open_reader(where, readers=readers)
    if source.fingerprint() != lora.lora_base_fingerprint:
        raise UserError(
            f"{opened.path} holds adapters of other weights than those in {where} (trained on {lora.lora_base})"
        )
    return source


def _whole(opened: Checkpoint) -> CheckpointReader:
    shapes = {parameter.name: parameter.shape for parameter in param_mapping.parameters(opened.config)}
    check_names(opened.path, shapes, opened.names(), of="the model of its run.json")
    tokenizer = opened.run.data.tokenizer_name_or_path
    beside = Path(tokenizer) if tokenizer else None
    theirs = read_config(beside)[0] if beside and (beside / "config.json").is_file() else {}

    def block(name: str, wanted: Slice2D) -> Tensor:
        shape = shapes[name]
        columns = math.prod(shape[1:])
        rows = opened.read(
            name, "master", ShardSpec(shape), 0, wanted.row * columns, wanted.rows * columns
        ).view(wanted.rows, columns)
        return rows[:, wanted.column : wanted.column + wanted.columns]

    return CheckpointReader(
        "training checkpoint",
        opened.path,
        opened.config,
        theirs,
        dict.fromkeys(shapes, torch.float32),
        block,
        beside,
    )
