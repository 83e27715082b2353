"""Our own training checkpoint as a source: the fp32 masters."""

import math
from pathlib import Path

import torch

from ascendspeed import checkpoint, weights
from ascendspeed.formats.source import Source, Stream, check_names, read_config


def is_one(folder: Path) -> bool:
    """Whether a folder holds, or is, a training checkpoint."""
    return checkpoint.looks_like_checkpoint(folder)


def open_folder(folder: Path) -> Source:
    """The newest good checkpoint in a folder, verified; tokenizer and token ids are those of the run's tokenizer folder."""
    opened = checkpoint.open_checkpoint(folder)
    shapes = {parameter.name: parameter.shape for parameter in weights.parameters(opened.config)}
    check_names(opened.path, shapes, opened.names(), of="the model of its run.json")
    tokenizer = opened.run.data.tokenizer_name_or_path
    beside = Path(tokenizer) if tokenizer else None
    theirs = read_config(beside)[0] if beside and (beside / "config.json").is_file() else {}

    def stream() -> Stream:
        for name, shape in shapes.items():
            yield name, opened.read(name, "master", weights.Cut(shape), 0, 0, math.prod(shape)).view(shape)

    return Source("training checkpoint", opened.path, opened.config, theirs, dict.fromkeys(shapes, torch.float32), stream, beside)
