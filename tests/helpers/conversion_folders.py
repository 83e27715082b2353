"""Folders to convert: tiny models as Hugging Face directories and as rank files."""

from functools import partial
from pathlib import Path

import pytest
import torch

from ascendspeed.conversion import convert
from helpers.conversion import (
    BASE,
    MODELS,
    command,
    hugging_face,
)

MIXED = "bf16, norms in fp32"


to_hf = partial(convert.write_hf, allow_nan=True)  # the tensors here are any bits


to_ranks = partial(convert.write_megatron, allow_nan=True)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """(model, kind) -> a directory and its tensors, written once."""
    made = {}

    def source(model: str, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if (model, kind) not in made:
            folder = tmp_path_factory.mktemp("hf") / "model"
            made[model, kind] = folder, hugging_face(folder, MODELS[model], kind)
        return made[model, kind]

    return source


@pytest.fixture
def hf(tmp_path) -> Path:
    """A good directory in three shards, to spoil."""
    hugging_face(tmp_path / "one", BASE)
    to_hf(convert.open_reader(tmp_path / "one"), tmp_path / "hf", max_shard_size="200KB")
    return tmp_path / "hf"


@pytest.fixture
def ranks(tmp_path, hf) -> Path:
    """Good rank files for TP 2 x PP 2, to spoil."""
    to_ranks(convert.open_reader(hf), tmp_path / "ranks", 2, 2)
    return tmp_path / "ranks"


def split(folder: Path, out: Path, *args: str) -> None:
    command(
        "llama/convert_weights_from_huggingface.py",
        "--input-model-dir",
        folder,
        "--output-model-dir",
        out,
        *args,
    )
