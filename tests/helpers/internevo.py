"""Models and folders in InternEvo's format for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families import FAMILIES
from helpers.conversion import same
from helpers.evo_oracle import (
    Shape,
    Trained,
    hugging_face,
    parts_of,
    states,
)

BIASED, PLAIN, GROUPED = Shape(bias=True), Shape(), Shape(heads=16, kv=8)


def config_of(family: str, shape: Shape) -> ModelConfig:
    return ModelConfig(
        family,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv,
        vocab_size=shape.vocab,
        max_position_embeddings=32,
        norm_epsilon=1e-5,
        rotary_base=1e4 if family == "internlm" else 1e6,
        add_qkv_bias=shape.bias,
        add_dense_bias=shape.bias,
    )


def config_json(folder: Path, family: str, shape: Shape, **more) -> None:
    (folder / "config.json").write_text(
        json.dumps(FAMILIES[family].write_config(config_of(family, shape)) | more)
    )


def directory(folder: Path, family: str, shape: Shape) -> dict[str, torch.Tensor]:
    """A Hugging Face directory of the oracle's tensors."""
    folder.mkdir()
    tensors = hugging_face(family, shape, parts_of(shape))
    save_file(tensors, folder / "model.safetensors")
    config_json(folder, family, shape)
    return tensors


def equal(folder: Path, shape: Shape, how: Trained) -> bool:
    """True if the files of a folder equal the oracle's: names, tensors, bits."""
    files = {path.name: torch.load(path, weights_only=True) for path in folder.glob("model_[tw]*.pt")}
    expected = states(shape, how, parts_of(shape))
    return files.keys() == expected.keys() and all(same(files[name], expected[name]) for name in files)
