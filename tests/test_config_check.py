"""A config.json that contradicts the tensors beside it is an error that names both."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.conversion import BASE, MODELS
from helpers.shapes import hf_shapes
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert
from ascendspeed.conversion.config_check import config_mismatches
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, PRESETS
from ascendspeed.utils.errors import UserError

LLAMA = MODELS["llama, 2 groups"]  # 4 layers, h 64, ffn 96, 8 heads and 2 groups of width 16, vocabulary 131
INTERNLM2, INTERNLM3, MIXTRAL, QWEN2_MOE = (
    MODELS[name] for name in ("internlm2", "internlm3", "mixtral", "qwen2_moe")
)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of such a model."""
    return {
        name: shape for p in param_mapping.parameters(config) for name, shape in hf_shapes(config, p).items()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_control_nothing_is_said_of_a_model_that_agrees(name):
    small = replace(PRESETS[name], num_layers=2)
    assert config_mismatches(small, shapes_of(small)) == []


CASES = [  # what the tensors are, what config.json says otherwise, what is said of it
    (LLAMA, {"num_layers": 3}, "config.json says num_hidden_layers = 3, but the tensors have 4 layers"),
    (LLAMA, {"num_layers": 12}, "config.json says num_hidden_layers = 12, but the tensors have 4 layers"),
    (LLAMA, {"hidden_size": 128}, "config.json says hidden_size = 128, but model.norm.weight is [64]"),
    (
        BASE,
        {"hidden_size": 128},
        "config.json says hidden_size = 128, but model.norm.weight is [64]",
    ),  # heads follow: once
    (
        LLAMA,
        {"ffn_hidden_size": 80},
        "config.json says intermediate_size = 80, but model.layers.0.mlp.down_proj.weight is [64, 96]",
    ),
    (
        LLAMA,
        {"vocab_size": 128},
        "config.json says vocab_size = 128, but model.embed_tokens.weight is [131, 64]",
    ),
    (
        LLAMA,
        {"kv_channels": 32},
        "config.json says head_dim = 32, but the 8 heads of the tensors are 16 wide",
    ),
    (
        LLAMA,
        {"num_attention_heads": 4},
        "config.json says num_attention_heads = 4 of width 16, but q of the tensors has 128 rows, 8 heads",
    ),
    (
        LLAMA,
        {"num_query_groups": 4},
        "config.json says num_key_value_heads = 4 of width 16, but k and v of the tensors has 32 rows, 2 "
        "heads",
    ),
    (
        INTERNLM2,
        {"num_query_groups": 4},
        "config.json says num_key_value_heads = 4 of width 8, but k and v of the tensors has 16 rows, 2 "
        "heads",
    ),
    (INTERNLM2, {"hidden_size": 32}, "config.json says hidden_size = 32, but model.norm.weight is [64]"),
    (
        BASE,
        {"add_qkv_bias": False, "add_dense_bias": False},
        "config.json says bias = false, but the tensors have a model.layers.0.",
    ),
    (
        MODELS["internlm without bias"],
        {"add_qkv_bias": True, "add_dense_bias": True},
        "config.json says bias = true, but the tensors have no",
    ),
    (
        INTERNLM3,
        {"add_qkv_bias": True},
        "config.json says qkv_bias = true, but the tensors have no model.layers.0.self_attn.q_proj.bias",
    ),
    (
        MODELS["qwen2"],
        {"add_qkv_bias": False},
        "a model of family qwen2 has add_qkv_bias = false, but the tensors have a model.layers.0.",
    ),
    (
        LLAMA,
        {"tie_embeddings": True},
        "config.json says tie_word_embeddings = true, but the tensors have a lm_head.weight",
    ),
    (
        replace(LLAMA, tie_embeddings=True),
        {"tie_embeddings": False},
        "config.json says tie_word_embeddings = false, but the tensors have no lm_head.weight",
    ),
    (MIXTRAL, {"num_experts": 8}, "config.json says num_local_experts = 8, but the tensors have 4 experts"),
    (
        MIXTRAL,
        {"ffn_hidden_size": 80},
        "config.json says intermediate_size = 80, but model.layers.0.block_sparse_moe.experts.0.w2.weight is",
    ),
    (QWEN2_MOE, {"num_experts": 3}, "config.json says num_experts = 3, but the tensors have 4 experts"),
    (
        QWEN2_MOE,
        {"moe_ffn_hidden_size": 24},
        "config.json says moe_intermediate_size = 24, but model.layers.0.mlp.experts.0.down_proj.weight is "
        "[64, 16]",
    ),
    (
        QWEN2_MOE,
        {"moe_shared_expert_intermediate_size": 24},
        "config.json says shared_expert_intermediate_size = 24, but "
        "model.layers.0.mlp.shared_expert.down_proj.weight is [64, 32]",
    ),
]


@pytest.mark.parametrize(("tensors", "wrong", "message"), CASES)
def test_one_contradiction_is_said_once(tensors, wrong, message):
    mismatches = config_mismatches(replace(tensors, **wrong), shapes_of(tensors))
    assert len(mismatches) == 1
    assert mismatches[0].startswith(message)


def test_several_are_all_said():
    mismatches = config_mismatches(
        replace(LLAMA, num_layers=30, vocab_size=100, ffn_hidden_size=64), shapes_of(LLAMA)
    )
    assert [line.split()[2] for line in mismatches] == [
        "num_hidden_layers",
        "vocab_size",
        "intermediate_size",
    ]


def test_what_cannot_be_told_is_not_said():
    assert config_mismatches(LLAMA, {}) == []
    assert (
        config_mismatches(LLAMA, {"transformer.h.0.attn.weight": (3, 3)}) == []
    )  # another program's names: left over, and said so
    assert (
        config_mismatches(replace(BASE, num_attention_heads=4), shapes_of(BASE)) == []
    )  # heads of 16 instead of 8: the same shapes
    renamed = {
        name.replace("q_proj.", "q_proj.base_layer."): shape for name, shape in shapes_of(LLAMA).items()
    }
    assert config_mismatches(LLAMA, renamed) == []  # q is missing, and said so
    strange = {name: shape[:1] for name, shape in shapes_of(LLAMA).items()}
    assert config_mismatches(LLAMA, strange) == []  # checked one by one afterwards


def test_a_directory_says_it_in_one_line(tmp_path):
    tensors = {name: torch.zeros(shape) for name, shape in shapes_of(LLAMA).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config_json = FAMILIES["llama"].write_config(LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(config_json | {"num_hidden_layers": 32}))
    with pytest.raises(UserError) as error:
        convert.open_reader(tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path}: config.json says num_hidden_layers = 32, but the tensors have 4 layers"
    )
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    convert.open_reader(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_as_transformers_hold_them(family, tmp_path):
    """`torch.save(model.state_dict())` of transformers 5 is no model that anybody reads; `save_pretrained`
    takes it apart.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = replace(PRESETS[f"{family}-tiny"], num_layers=1, vocab_size=32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family].write_config(config)))
    model.save_pretrained(tmp_path)
    assert convert.open_reader(tmp_path).config == config  # control
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"gate_up_proj holds all experts of a layer, .*: write the model by save_pretrained$"
    ):
        convert.open_reader(tmp_path)
