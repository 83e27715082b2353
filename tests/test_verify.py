"""Verification: what it says is true, and what it must see it sees."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from helpers.shapes import hf_shapes
from safetensors.torch import load_file, save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert, verify, verify_logits
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, PRESETS
from ascendspeed.utils.errors import UserError

TINY = {name.removesuffix("-tiny"): config for name, config in PRESETS.items() if name.endswith("-tiny")}
STAND_INS = {"internlm": "llama", "internlm2": "llama", "baichuan": "llama"}


def directory(folder, config: ModelConfig, dtype: torch.dtype = torch.float32):
    """A Hugging Face directory of random weights, written by the library itself."""
    generator, tensors = torch.Generator().manual_seed(4), {}
    for parameter in param_mapping.parameters(config):
        for name, shape in hf_shapes(config, parameter).items():
            tensors[name] = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FAMILIES[config.family].write_config(config)))
    return folder


def converted(source, target, to, **more) -> dict:
    convert.convert(convert.open_reader(source), target, to, verify=True, **more)
    return json.loads((target / "conversion.json").read_text())


def test_what_is_left_behind(cpu, tmp_path):
    config = replace(TINY["internlm"], num_layers=4)
    result_json = converted(
        directory(tmp_path / "hf", config),
        tmp_path / "ranks",
        convert.RankFileWriter(2, 2),
        dtype=torch.bfloat16,
    )
    assert (
        result_json["verdict"] == "exact: every byte of 35 parameters, cast to torch.bfloat16; logits equal"
    )
    assert result_json["from"] == {
        "kind": "Hugging Face directory",
        "folder": str(tmp_path / "hf"),
        "family": "internlm",
    }
    assert result_json["to"]["kind"] == "Megatron rank files for TP 2 x PP 2"
    files = result_json["to"]["files"]
    assert files["release/mp_rank_01_001/model_optim_rng.pt"] == (
        (tmp_path / "ranks/release/mp_rank_01_001/model_optim_rng.pt").stat().st_size
    )
    down = load_file(tmp_path / "hf/model.safetensors")["model.layers.3.mlp.down_proj.weight"].bfloat16()
    by_hand = hashlib.sha256(down.view(torch.int16).numpy().tobytes()).hexdigest()
    assert result_json["sha256"]["decoder.layers.3.mlp.linear_fc2.weight"] == by_hand
    assert len(result_json["sha256"]) == 35
    assert result_json["versions"]["torch"] == torch.__version__
    logits = result_json["logits"]
    assert (logits["source"], logits["result"], logits["layers"]) == ("transformers' llama", "our model", 2)
    assert 0 < logits["difference"] < 1e-4 * logits["largest"]


@pytest.mark.breadth
@pytest.mark.parametrize("name", TINY)
def test_ends_are_compared_by_an_implementation_of_their_own_where_there_is_one(cpu, tmp_path, name):
    config = replace(TINY[name], num_layers=3)
    result_json = converted(
        directory(tmp_path / "hf", config), tmp_path / "ranks", convert.RankFileWriter(2)
    )["logits"]
    assert result_json["source"] == f"transformers' {STAND_INS.get(config.family, config.family)}"
    assert result_json["result"] == "our model"
    assert result_json["layers"] == 2
    assert result_json["difference"] <= 2e-5 * result_json["largest"]


@pytest.mark.parametrize("name", ["internlm", "internlm2", "internlm3"])
def test_a_plain_llama_is_compared_by_transformers(cpu, tmp_path, name):
    config = replace(TINY[name], num_layers=2)
    result_json = converted(
        directory(tmp_path / "hf", config), tmp_path / "llama", convert.HuggingFaceWriter("llama")
    )["logits"]
    assert result_json["result"] == "transformers' llama"
    assert result_json["difference"] <= 2e-5 * result_json["largest"]


def test_a_row_that_is_wrong_both_ways_round_is_seen(cpu, tmp_path, monkeypatch):
    """Gate and up swapped in the table: every byte survives the round trip, and the model is another one."""
    source = directory(tmp_path / "hf", TINY["llama"])
    family = FAMILIES["llama"]
    wrong = tuple(
        replace(row, hf_params=row.hf_params[::-1]) if row.fusion == "glu" else row
        for row in family.param_mappings
    )
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "llama", replace(family, param_mappings=wrong))
        convert.write_hf(convert.open_reader(source), tmp_path / "back")
        opened = convert.open_reader(source)
        assert (
            len(verify.compare(opened, convert.open_reader(tmp_path / "back"))) == 35 - 8
        )  # no biases: bytes see nothing
        with pytest.raises(
            UserError,
            match=r"verification failed: logits of transformers' llama .* and our model .* differ by",
        ):
            convert.convert(opened, tmp_path / "ranks", convert.RankFileWriter(2), verify=True)
    assert not (tmp_path / "ranks").exists()
    assert (
        load_file(source / "model.safetensors").keys()
        == load_file(tmp_path / "back/model.safetensors").keys()
    )


def test_a_type_that_is_not_the_one_asked_for_is_seen(tmp_path):
    source = convert.open_reader(directory(tmp_path / "hf", TINY["internlm"]))
    with pytest.raises(UserError, match="is not what"):
        verify.compare(source, source, torch.bfloat16)


def test_too_little_memory_is_said(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(verify_logits, "_available_memory", lambda: 1000)
    result_json = converted(
        directory(tmp_path / "hf", TINY["internlm"]), tmp_path / "ranks", convert.RankFileWriter(2)
    )
    assert "GB of memory" in result_json["logits"]["skipped"]
    assert result_json["verdict"].startswith("exact: every byte of 35 parameters; logits not compared: ")


def test_what_transformers_saved_itself(cpu, tmp_path):
    """Its config.json has lists of one entry a layer; a vocabulary as large as the hidden size is told apart
    by name.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 320,
        "vocab_size": 320,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=5, **sizes)).save_pretrained(tmp_path / "hf")
    assert len(json.loads((tmp_path / "hf/config.json").read_text())["layer_types"]) == 5
    result_json = converted(tmp_path / "hf", tmp_path / "ranks", convert.RankFileWriter(2))["logits"]
    assert (result_json["source"], result_json["vocabulary"]) == ("transformers' qwen2", 256)
    assert result_json["difference"] <= 2e-5 * result_json["largest"]


@pytest.mark.parametrize("name", ["internlm2", "baichuan2"])
def test_the_stand_in_is_an_implementation_of_its_own(cpu, tmp_path, monkeypatch, name):
    """Our rows may be wrong both ways round: the names that the stand-in goes by are said apart from them."""
    source = directory(tmp_path / "hf", replace(TINY[name], num_layers=2))
    family = FAMILIES[TINY[name].family]
    wrong = tuple(
        replace(row, hf_params=row.hf_params[::-1]) if row.fusion == "glu" else row
        for row in family.param_mappings
    )
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, family.name, replace(family, param_mappings=wrong))
        with pytest.raises(UserError, match=r"verification failed: logits of transformers' llama"):
            convert.convert(
                convert.open_reader(source), tmp_path / "ranks", convert.RankFileWriter(2), verify=True
            )


def test_a_model_that_transformers_cannot_load_is_reported_as_not_compared(cpu, tmp_path, monkeypatch):
    import transformers

    def fail(*_, **__):
        raise ValueError("no such class\nand more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    report = converted(
        directory(tmp_path / "hf", TINY["internlm"]), tmp_path / "ranks", convert.RankFileWriter(2)
    )
    assert report["logits"] == {"skipped": "no logits: ValueError: no such class"}
    assert report["verdict"].endswith("; logits not compared: no logits: ValueError: no such class")
    expected = (
        "verified, every byte of 35 parameters; logits not compared: no logits: ValueError: no such class"
    )
    assert verify.summary(report) == expected


@pytest.mark.parametrize("function", ["_own_logits", "_reduced_tensors"])
@pytest.mark.parametrize("error", [TypeError, RuntimeError, ValueError, KeyError])
def test_an_error_in_the_comparison_itself_is_not_swallowed(cpu, tmp_path, monkeypatch, function, error):
    def fail(*_):
        raise error("a mistake of this program")

    monkeypatch.setattr(verify_logits, function, fail)
    source = directory(tmp_path / "hf", TINY["internlm"])
    with pytest.raises(error, match="a mistake of this program"):
        converted(source, tmp_path / "ranks", convert.RankFileWriter(2))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_summary_names_both_implementations(cpu, tmp_path):
    report = converted(
        directory(tmp_path / "hf", TINY["internlm"]), tmp_path / "ranks", convert.RankFileWriter(2)
    )
    expected = (
        "verified, every byte of 35 parameters; logits equal (transformers' llama and our model, 2 layers)"
    )
    assert verify.summary(report) == expected
