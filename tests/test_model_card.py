"""Model cards: what a training checkpoint records reaches every export."""

import warnings
from dataclasses import replace

import pytest
from helpers.conversion import hugging_face, training_checkpoint
from helpers.round_trips import BY_FAMILY

from ascendspeed.checkpoint.discovery import open_checkpoint
from ascendspeed.conversion import convert, model_card
from ascendspeed.conversion.formats import peft
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.lora.adapter import LoraAdapter


@pytest.fixture
def checkpoint(tmp_path):
    """A training checkpoint on a llama whose folder states a licence."""
    full = dict(_opened(tmp_path / "base").tensors())
    (tmp_path / "base" / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\n# Base\n")
    training_checkpoint(tmp_path / "ckpt", BY_FAMILY["llama"], full, tmp_path / "base", "v2")
    return tmp_path / "ckpt"


def _opened(folder):
    hugging_face(folder, BY_FAMILY["llama"], "finite")
    return convert.open_reader(folder)


def test_a_card_names_base_data_recipe_loss_and_licence(checkpoint, tmp_path):
    opened = open_checkpoint(checkpoint)
    opened.run = replace(
        opened.run,
        train=replace(opened.run.train, load="internlm2-7b"),
        data=replace(opened.run.data, data_path=("0.3", "gone/a", "0.7", "gone/b")),
        lora=replace(opened.run.lora, lora_rank=8),
    )
    opened.state = replace(opened.state, loss=1.25)
    section = model_card.training_section(opened)
    for line in (
        "Base weights: internlm2-7b",
        "Data: gone/a (weight 0.3, no digest recorded)",
        "Chat template: v2",
        "Length: 7 of 1000 iterations",
        "Recipe: fp32, learning rate 0.00015 (cosine to 1e-05), weight decay 0.01, gradient clipping 1, seed",
        "LoRA: rank 8, alpha 16",
        "Training loss of the last iteration: 1.2500",
    ):
        assert f"- {line}" in section
    assert "loss of the last iteration: not recorded" in model_card.training_section(
        open_checkpoint(checkpoint)
    )


def test_the_card_travels_from_export_to_export(checkpoint, tmp_path):
    convert.write_hf(convert.open_reader(checkpoint), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "Loads in stock transformers" in card
    assert "- Chat template: v2" in card
    convert.write_hf(convert.open_reader(tmp_path / "hf"), tmp_path / "again")
    assert model_card.recorded_section(tmp_path / "again") == model_card.recorded_section(tmp_path / "hf")
    convert.write_hf(convert.open_reader(tmp_path / "base"), tmp_path / "plain")
    assert "## Training" not in (tmp_path / "plain" / "README.md").read_text()  # nothing is known of it
    assert "InternLM's model code" in " ".join(model_card.what_loads(FAMILIES["internlm2"]))


def test_adapters_have_a_card(tmp_path):
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["wo"]}
    peft.write(LoraAdapter(tmp_path, {}, settings, training_notes="- Data: d"), tmp_path / "adapter")
    assert model_card.recorded_section(tmp_path / "adapter") == "- Data: d"
    assert (tmp_path / "adapter" / "README.md").read_text().startswith("---\nlibrary_name: peft\n")


def test_megatron_is_imported_without_its_warnings(tmp_path):
    """The facts of the data need Megatron-core, whose warnings about absent packages every export printed."""
    text = "Transformer Engine and Apex are not installed"
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.warn(text, stacklevel=1)  # control
        assert model_card._data((str(tmp_path / "absent"),)) == [f"{tmp_path}/absent (no digest recorded)"]
        warnings.warn(text, stacklevel=1)
    assert [str(warning.message) for warning in caught].count(text) == 1
