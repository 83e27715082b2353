"""The table of families and formats: every pair in it is exact both ways, every other one is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.conversion import LAYOUTS, MODELS, hugging_face, same, training_checkpoint, written
from helpers.mindformers import renamed, write_ckpt

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.internevo import InternEvoWriter
from ascendspeed.conversion.support_matrix import FORMATS
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


def there(form: str, folder: Path, tmp_path: Path, tp: int, pp: int) -> None:
    """From a Hugging Face directory to the format, at `tmp_path / "there"`."""
    source, target = convert.open_reader(folder), tmp_path / "there"
    formats = {
        "hf": convert.HuggingFaceWriter(max_shard_size=50_000),
        "hf-llama": convert.HuggingFaceWriter("llama"),
        "megatron": convert.RankFileWriter(tp, pp),
        "ascendspeed": convert.RankFileWriter(tp, pp),
        "deepspeed": convert.RankFileWriter(tp, deepspeed=True),
        "internevo": InternEvoWriter(tp, pp),
    }
    if form == "mindformers":
        target.mkdir()
        shutil.copyfile(folder / "config.json", target / "config.json")
        held = {name: tensor for name, tensor in written(folder).items() if "inv_freq" not in name}
        write_ckpt(target / "model.ckpt", {renamed(name): tensor for name, tensor in held.items()})
    elif form == "training":
        training_checkpoint(target, source.config, dict(source.tensors()), folder)
    else:
        convert.convert(source, target, formats[form], allow_nan=True)
    if form == "ascendspeed":
        to_old_names(target)


def round_trip(form: str, family: str, tp: int, pp: int, kind: str, tmp_path: Path) -> None:
    tensors = hugging_face(tmp_path / "hf", model(form, family), kind)
    there(form, tmp_path / "hf", tmp_path, tp, pp)
    source = convert.open_reader(tmp_path / "there")
    convert.write_hf(source, tmp_path / "back", family=family, allow_nan=True)
    assert same(written(tmp_path / "back"), tensors)
    assert convert.open_reader(tmp_path / "back").config == convert.open_reader(tmp_path / "hf").config


PAIRS = [
    (form, family) for form, holds in FORMATS.items() for family in dict.fromkeys(holds.writes + holds.reads)
]


@pytest.mark.parametrize(("form", "family"), PAIRS)
def test_there_and_back(tmp_path, form, family):
    round_trip(
        form, family, 2, 1 if form == "deepspeed" else 2, "fp32" if form == "training" else "bf16", tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("kind", ["fp32", "bf16, norms in fp32"])
@pytest.mark.parametrize(
    ("form", "family"),
    [pair for pair in PAIRS if pair[0] in ("megatron", "deepspeed", "ascendspeed", "internevo")],
)
def test_every_layout(tmp_path, form, family, tp, pp, kind):
    round_trip(form, family, tp, 1 if form == "deepspeed" else pp, kind, tmp_path)


@pytest.mark.parametrize(
    ("form", "family"),
    [
        (form, family)
        for form, holds in FORMATS.items()
        if holds.writes
        for family in FAMILIES
        if family not in holds.writes
    ],
)
def test_what_is_not_in_the_table_is_not_written(tmp_path, form, family):
    hugging_face(tmp_path / "hf", BY_FAMILY[family], "bf16")
    with pytest.raises(UserError, match=family):
        there(form, tmp_path / "hf", tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in FORMATS["ascendspeed"].reads]
)
def test_old_names_of_other_families_are_not_read(tmp_path, family):
    hugging_face(tmp_path / "hf", BY_FAMILY[family], "bf16")
    there("ascendspeed", tmp_path / "hf", tmp_path, 1, 1)
    with pytest.raises(UserError, match=f"a model of family {family} cannot be read from ascendspeed"):
        convert.open_reader(tmp_path / "there")


def test_control_a_name_that_is_not_renamed_is_seen(tmp_path):
    hugging_face(tmp_path / "hf", BY_FAMILY["internlm"], "bf16")
    there("ascendspeed", tmp_path / "hf", tmp_path, 1, 1)
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
