"""Our own training checkpoint as a source: the fp32 masters."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ascendspeed import checkpoint, weights
from ascendspeed.errors import UserError
from ascendspeed.formats.source import Source, check_names, read_config
from ascendspeed.weights import Cut, Tile


def is_one(folder: Path) -> bool:
    """Whether a folder holds, or is, a training checkpoint."""
    return checkpoint.looks_like_checkpoint(folder)


def open_folder(folder: Path, config: Path) -> Source:
    """The newest good checkpoint in a folder, verified; tokenizer and token ids are those of the run's tokenizer folder."""
    if config != folder:
        raise UserError(
            f"{folder} is a training checkpoint, which knows its model: leave --config out (--tokenizer names a tokenizer)"
        )
    opened = checkpoint.open_checkpoint(folder)
    shapes = {parameter.name: parameter.shape for parameter in weights.parameters(opened.config)}
    check_names(opened.path, shapes, opened.names(), of="the model of its run.json")
    tokenizer = opened.run.data.tokenizer_name_or_path
    beside = Path(tokenizer) if tokenizer else None
    theirs = read_config(beside)[0] if beside and (beside / "config.json").is_file() else {}

    def block(name: str, wanted: Tile) -> Tensor:
        shape = shapes[name]
        columns = math.prod(shape[1:])
        rows = opened.read(name, "master", Cut(shape), 0, wanted.row * columns, wanted.rows * columns).view(wanted.rows, columns)
        return rows[:, wanted.column : wanted.column + wanted.columns]

    return Source("training checkpoint", opened.path, opened.config, theirs, dict.fromkeys(shapes, torch.float32), block, beside)
