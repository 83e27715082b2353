"""Folders that are not what they are taken for: adapters as a model, a chat template of the model's own,
and repeated rope entries."""

import json
from pathlib import Path

import pytest
from helpers.tokenizers import CHAT, chat_files, folder_with, trained

from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.inference.args import EngineArgs, EngineSpec
from ascendspeed.inference.session import _load_tokenizer
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat, to_jinja
from ascendspeed.utils.errors import UserError


@pytest.fixture
def adapters(tmp_path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/base"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_adapters_are_no_model(adapters, tmp_path):
    advice = rf"tools/lora/merge_lora\.py --base /models/base --adapter {adapters} --save DIR.*--lora-load"
    with pytest.raises(UserError, match=advice):
        open_reader(adapters)
    spec = EngineSpec(EngineArgs(load=str(adapters)), None, None, str(adapters))
    with pytest.raises(UserError, match=advice):  # before the tokenizer that is missing there
        _load_tokenizer(spec, False)
    with pytest.raises(UserError, match="holds no checkpoint"):  # control
        open_reader(tmp_path)


PLACES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")


@pytest.mark.parametrize("place", [*PLACES, None])
def test_a_chat_template_of_the_models_own_is_named(place, tmp_path):
    model = trained(user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)])
    files = chat_files(model)
    template = files["config"].pop("chat_template")
    if place == "tokenizer_config.json":
        files["config"]["chat_template"] = template
    folder = folder_with(tmp_path / "t", model, **files)
    if place in PLACES[1:]:
        (folder / place).write_text(template)
    chat_format = ChatFormat(tokenizer.load(folder), "v2.5")
    notes = [note for note in chat_format.notes if "chat template of the model's own" in note]
    if place is None:
        assert notes == []
        (folder / "chat_template.jinja").write_text(to_jinja(chat_format))
        assert chat_format.notes == []  # control: the one that this project wrote
        return
    (note,) = notes
    assert note.startswith(f"{folder / place} has a chat template")
    assert "the template v2.5 (--chat-template" in note
    assert set(CHAT) <= set(chat_format.tokenizer.added_tokens)


CONFIG = FAMILIES["llama"].write_config(FAMILIES["llama"].presets["llama-tiny"])


@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_the_trained_length_said_twice_in_rope_scaling(kind):
    plain = {"rope_type": kind, "factor": 2.0}
    twice = plain | {"original_max_position_embeddings": CONFIG["max_position_embeddings"]}
    read = FAMILIES["llama"].read_config
    for spelling in ("rope_scaling", "rope_parameters"):
        values = {key: value for key, value in CONFIG.items() if key != "rope_scaling"}
        assert read(values | {spelling: twice}) == read(values | {spelling: plain})
        with pytest.raises(
            UserError,
            match="original_max_position_embeddings = 128 is supported for rope scaling 'llama3' and 'yarn'",
        ):
            read(values | {spelling: plain | {"original_max_position_embeddings": 128}})


def test_defaults_are_not_quoted_as_the_files_word():
    from helpers.shapes import hf_shapes

    from ascendspeed.conversion.config_check import config_mismatches
    from ascendspeed.models import param_mapping

    internlm2 = FAMILIES["internlm2"]
    values = internlm2.write_config(internlm2.presets["internlm2-tiny"])
    config = internlm2.read_config(values)
    shapes = {}
    for parameter in param_mapping.parameters(config):
        shapes |= hf_shapes(config, parameter)
    silent = {key: value for key, value in values.items() if key != "bias"}
    with_bias = internlm2.read_config(silent)
    (line,) = config_mismatches(with_bias, shapes, silent)
    assert line.startswith("config.json does not say bias, which means true, but the tensors have no ")
    (line,) = config_mismatches(with_bias, shapes, values | {"bias": True})
    assert line.startswith("config.json says bias = true, but the tensors have no ")
