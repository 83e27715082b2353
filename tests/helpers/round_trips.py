"""Round trips of every checkpoint format: Hugging Face -> format -> Hugging Face."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import CheckpointFormat, WriteOptions
from helpers.conversion import MODELS, hugging_face, same, training_checkpoint, written
from helpers.mindformers import renamed, write_ckpt

BY_FAMILY = {config.family: config for config in reversed(MODELS.values())}
EVEN = {"num_attention_heads": 16, "vocab_size": 136}
"""InternEvo's ranks hold whole key/value groups and equal shares of the vocabulary; 8 groups, so that 8 ranks
can.
"""


def model(form: str, family: str):
    config = BY_FAMILY[family]
    if form == "internevo":
        config = replace(
            config, **EVEN, num_query_groups=8 if config.num_query_groups else None, kv_channels=None
        )
    return config


def to_old_names(folder: Path) -> None:
    """Rank files under AscendSpeed's names, by the names alone."""
    inner, layer = "language_model.encoder.", "language_model.encoder.layers."
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
    for path in folder.rglob("*.pt"):
        stored = torch.load(path, weights_only=True)
        renamed = {}
        for name, tensor in stored["model"].items():
            for megatron_name, old_name in (
                ("embedding.", "language_model.embedding."),
                ("output_layer.", "word_embeddings_for_head." if tied else "language_model.output_layer."),
                ("decoder.layers.", layer),
                ("decoder.final", inner + "final"),
                ("linear_qkv", "query_key_value"),
                ("linear_proj", "dense"),
                ("pre_mlp", "post_attention"),
                ("linear_fc2", "dense_4h_to_h"),
            ):
                name = name.replace(megatron_name, old_name)
            for new, part in (
                zip(("gate_proj", "dense_h_to_4h"), tensor.chunk(2), strict=True)
                if "linear_fc1" in name
                else [("", tensor)]
            ):
                renamed[name.replace("linear_fc1", new)] = part.clone()
        torch.save(stored | {"model": renamed}, path)


def write_as(form: CheckpointFormat, folder: Path, tmp_path: Path, tp: int, pp: int) -> None:
    """Writes a Hugging Face directory in a format, at `tmp_path / "there"`; formats that no writer has are
    made by hand.
    """
    source, target = convert.open_reader(folder), tmp_path / "there"
    if form.name == "mindformers":
        target.mkdir()
        shutil.copyfile(folder / "config.json", target / "config.json")
        stored = {name: tensor for name, tensor in written(folder).items() if "inv_freq" not in name}
        write_ckpt(target / "model.ckpt", {renamed(name): tensor for name, tensor in stored.items()})
    elif form.name == "training":
        training_checkpoint(target, source.config, dict(source.tensors()), folder)
    elif form.name == "ascendspeed":
        convert.convert(source, target, convert.RankFileWriter(tp, pp), allow_nan=True)
        to_old_names(target)
    else:
        options = WriteOptions(tp=tp, pp=pp, max_shard_size="50KB")
        convert.convert(source, target, form.writer(options), allow_nan=True)


def round_trip(form: CheckpointFormat, family: str, tp: int, pp: int, kind: str, tmp_path: Path) -> None:
    tensors = hugging_face(tmp_path / "hf", model(form.name, family), kind)
    write_as(form, tmp_path / "hf", tmp_path, tp, pp)
    source = convert.open_reader(tmp_path / "there")
    convert.write_hf(source, tmp_path / "back", family=family, allow_nan=True)
    assert same(written(tmp_path / "back"), tensors)
    assert convert.open_reader(tmp_path / "back").config == convert.open_reader(tmp_path / "hf").config


def supported_pairs(forms: Iterable[CheckpointFormat]) -> list:
    """Every (format, family) that is read or written, as test parameters."""
    return [
        pytest.param(form, family, id=f"{form.name}-{family}")
        for form in forms
        for family in dict.fromkeys(form.families("write") + form.families("read"))
    ]
