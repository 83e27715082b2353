"""The table of families and formats: every pair in it is exact both ways, every other one is refused."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.conversion import LAYOUTS, MODELS, hugging_face, same, training_checkpoint, written
from helpers.mindformers import renamed, write_ckpt

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import CheckpointFormat, WriteOptions
from ascendspeed.conversion.formats.registry import FORMATS, format_named, writable_formats
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError

BY_FAMILY = {config.family: config for config in reversed(MODELS.values())}
EVEN = {"num_attention_heads": 16, "vocab_size": 136}
"""InternEvo's ranks hold whole key/value groups and equal shares of the vocabulary; 8 groups, so that 8 ranks can."""


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
        held = torch.load(path, weights_only=True)
        renamed = {}
        for name, tensor in held["model"].items():
            for ours, theirs in (
                ("embedding.", "language_model.embedding."),
                ("output_layer.", "word_embeddings_for_head." if tied else "language_model.output_layer."),
                ("decoder.layers.", layer),
                ("decoder.final", inner + "final"),
                ("linear_qkv", "query_key_value"),
                ("linear_proj", "dense"),
                ("pre_mlp", "post_attention"),
                ("linear_fc2", "dense_4h_to_h"),
            ):
                name = name.replace(ours, theirs)
            for new, part in (
                zip(("gate_proj", "dense_h_to_4h"), tensor.chunk(2), strict=True)
                if "linear_fc1" in name
                else [("", tensor)]
            ):
                renamed[name.replace("linear_fc1", new)] = part.clone()
        torch.save(held | {"model": renamed}, path)


def write_as(form: CheckpointFormat, folder: Path, tmp_path: Path, tp: int, pp: int) -> None:
    """Writes a Hugging Face directory in a format, at `tmp_path / "there"`; formats that no writer has are made by hand."""
    source, target = convert.open_reader(folder), tmp_path / "there"
    if form.name == "mindformers":
        target.mkdir()
        shutil.copyfile(folder / "config.json", target / "config.json")
        held = {name: tensor for name, tensor in written(folder).items() if "inv_freq" not in name}
        write_ckpt(target / "model.ckpt", {renamed(name): tensor for name, tensor in held.items()})
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


RANK_FILES = [form for form in FORMATS if form.name in ("megatron", "deepspeed", "ascendspeed", "internevo")]
LEGACY = format_named("ascendspeed")


@pytest.mark.parametrize(("form", "family"), supported_pairs(FORMATS))
def test_there_and_back(tmp_path, form, family):
    pp = 1 if form.name == "deepspeed" else 2
    round_trip(form, family, 2, pp, "fp32" if form.name == "training" else "bf16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("kind", ["fp32", "bf16, norms in fp32"])
@pytest.mark.parametrize(("form", "family"), supported_pairs(RANK_FILES))
def test_every_layout(tmp_path, form, family, tp, pp, kind):
    round_trip(form, family, tp, 1 if form.name == "deepspeed" else pp, kind, tmp_path)


@pytest.mark.parametrize(
    ("form", "family"),
    [
        pytest.param(form, family, id=f"{form.name}-{family}")
        for form in writable_formats()
        for family in FAMILIES
        if not form.supports(family, "write")
    ],
)
def test_what_is_not_in_the_table_is_not_written(tmp_path, form, family):
    hugging_face(tmp_path / "hf", BY_FAMILY[family], "bf16")
    with pytest.raises(UserError, match=family):
        write_as(form, tmp_path / "hf", tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if not LEGACY.supports(family, "read")])
def test_old_names_of_other_families_are_not_read(tmp_path, family):
    hugging_face(tmp_path / "hf", BY_FAMILY[family], "bf16")
    write_as(LEGACY, tmp_path / "hf", tmp_path, 1, 1)
    with pytest.raises(UserError, match=f"a model of family {family} cannot be read from ascendspeed"):
        convert.open_reader(tmp_path / "there")


def test_control_a_name_that_is_not_renamed_is_seen(tmp_path):
    hugging_face(tmp_path / "hf", BY_FAMILY["internlm"], "bf16")
    write_as(LEGACY, tmp_path / "hf", tmp_path, 1, 1)
    (path,) = (tmp_path / "there").rglob("*.pt")
    held = torch.load(path, weights_only=True)
    held["model"]["language_model.encoder.layers.1.mlp.up"] = held["model"].pop(
        "language_model.encoder.layers.1.mlp.dense_h_to_4h.weight"
    )
    torch.save(held, path)
    with pytest.raises(
        UserError,
        match=r"lacks .*layers\.1\.mlp\.dense_h_to_4h\.weight; it has left over .*layers\.1\.mlp\.up",
    ):
        convert.open_reader(tmp_path / "there")
