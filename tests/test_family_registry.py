"""Adding a model family: one entry reaches `--model`, `--load`, conversion, the support table and the
estimates."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.conversion import hugging_face, same, small, written
from helpers.round_trips import BY_FAMILY, round_trip

from ascendspeed.cli.train_args import resolve
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats import registry
from ascendspeed.models import estimates, families
from ascendspeed.models.families import FAMILIES, PRESETS
from ascendspeed.models.families.base import ConfigMapping, Family
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, PARAM_MAPPINGS, TINY
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parent.parent
NO_FAMILY_MEANT = {
    "config/schema/model.py": "internlm",  # default of --model's architecture flags
    "conversion/formats/gguf/writing.py": "llama",  # an architecture of llama.cpp
    "distributed/training_kernels.py": "llama",  # a casting mode of Liger's RMSNorm
}
CONFIG = families.preset("llama-tiny")


def renamed(name: str) -> str:
    return name.replace("model.", "toy.").replace("self_attn", "attn")


TOY = Family(
    name="toy",
    architecture="ToyForCausalLM",
    config_mappings=(*CONFIG_MAPPINGS, ConfigMapping("biases", ("add_qkv_bias", "add_dense_bias"), False)),
    param_mappings=tuple(
        replace(mapping, hf_params=tuple(renamed(name) for name in mapping.hf_params))
        for mapping in PARAM_MAPPINGS
    ),
    required_values={"hidden_act": "silu"},
    chat_template="v2",
    extra_formats=("hf-llama",),
    presets={"toy-tiny": replace(CONFIG, family="toy", **TINY)},
)


@pytest.fixture
def with_toy(monkeypatch):
    """The registry with the toy family."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    monkeypatch.setitem(PRESETS, "toy-tiny", TOY.presets["toy-tiny"])
    monkeypatch.setitem(BY_FAMILY, "toy", small(TOY.presets["toy-tiny"]))


def test_its_preset_is_a_model(with_toy):
    run, _ = resolve(["--deepspeed", "--data-path", "data", "--model", "toy-tiny"], 1)
    assert run.model == TOY.presets["toy-tiny"]
    assert estimates.parameter_count(run.model) == estimates.parameter_count(CONFIG)


def test_its_config_json_is_loaded(with_toy, tmp_path):
    hugging_face(tmp_path / "hf", BY_FAMILY["toy"])
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["ToyForCausalLM"]
    run, _ = resolve(["--deepspeed", "--data-path", "data", "--load", str(tmp_path / "hf")], 1)
    assert run.model == BY_FAMILY["toy"]
    assert families.chat_template_beside(tmp_path / "hf") == "v2"


@pytest.mark.parametrize("form", ["megatron", "ascendspeed"])
def test_it_is_converted_both_ways(with_toy, tmp_path, form):
    round_trip(registry.format_named(form), "toy", 2, 2, "bf16", tmp_path)
    assert any(name.startswith("toy.layers.0.attn.") for name in written(tmp_path / "back"))


def test_it_is_written_as_a_llama(with_toy, tmp_path):
    tensors = hugging_face(tmp_path / "hf", BY_FAMILY["toy"], "finite")
    convert.write_hf(convert.open_reader(tmp_path / "hf"), tmp_path / "llama", family="llama")
    as_llama = {name.replace("toy.", "model.").replace("attn", "self_attn"): t for name, t in tensors.items()}
    assert same(written(tmp_path / "llama"), as_llama)


def test_the_support_table_has_a_column(with_toy):
    head, _, *rows = registry.support_table()
    assert head.endswith(" toy |")
    cells = {row.split("`")[1]: row.rsplit("|", 2)[1].strip() for row in rows}
    assert cells["hf"] == cells["megatron"] == "R W"
    assert cells["ascendspeed"] == "R"  # no experts
    assert cells["internevo"] == cells["mindformers"] == "–"


def test_control_without_the_entry_nothing_knows_it(tmp_path):
    with pytest.raises(UserError, match="unknown model 'toy-tiny'"):
        resolve(["--deepspeed", "--data-path", "data", "--model", "toy-tiny"], 1)
    with pytest.raises(UserError, match="model_type 'toy' is not supported"):
        families.family_of({"model_type": "toy"})
    (tmp_path / "config.json").write_text('{"model_type": []}')
    with pytest.raises(UserError, match=rf"^{tmp_path}: config.json: model_type \[\] is not supported"):
        families.read_config(tmp_path / "config.json")
    assert "toy" not in registry.support_table()[0]


def family_names(source: str) -> set[str]:
    """String literals of a module that are the name of a family."""
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and value in FAMILIES}


def test_no_family_is_named_outside_its_entry():
    package, found = ROOT / "ascendspeed", {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith("models/families/"):
            names = family_names(path.read_text()) - {NO_FAMILY_MEANT.get(name, "")}
            found |= {name: names} if names else {}
    assert not found
    assert family_names('if model.family == "internlm2": pass') == {"internlm2"}  # control
