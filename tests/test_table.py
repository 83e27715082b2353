"""Every pair of format and family in the support table is exact in both directions; every other pair is
refused.
"""

import pytest
import torch
from helpers.conversion import LAYOUTS, hugging_face
from helpers.round_trips import BY_FAMILY, round_trip, supported_pairs, write_as

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import WriteOptions
from ascendspeed.conversion.formats.registry import FORMATS, format_named, writable_formats
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError

RANK_FILES = [form for form in FORMATS if form.name in ("megatron", "deepspeed", "ascendspeed", "internevo")]
LEGACY = format_named("ascendspeed")


READ = [form for form in FORMATS if form.families("read")]
"""All but GGUF, which is only written: test_gguf.py."""


@pytest.mark.breadth
@pytest.mark.parametrize(("form", "family"), supported_pairs(READ))
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
    source = convert.open_reader(tmp_path / "hf")
    with pytest.raises(UserError, match=family):
        convert.convert(source, tmp_path / "there", form.writer(WriteOptions()), allow_nan=True)
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
    stored = torch.load(path, weights_only=True)
    stored["model"]["language_model.encoder.layers.1.mlp.up"] = stored["model"].pop(
        "language_model.encoder.layers.1.mlp.dense_h_to_4h.weight"
    )
    torch.save(stored, path)
    with pytest.raises(
        UserError,
        match=r"lacks .*layers\.1\.mlp\.dense_h_to_4h\.weight; it has left over .*layers\.1\.mlp\.up",
    ):
        convert.open_reader(tmp_path / "there")
