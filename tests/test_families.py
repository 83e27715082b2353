"""config.json <-> ModelConfig: every spelling in, one spelling out, and what cannot be expressed is refused."""

from dataclasses import replace

import pytest

from ascendspeed import weights
from ascendspeed.config import ModelConfig
from ascendspeed.errors import UserError
from ascendspeed.families import FAMILIES, PRESETS, family_of, preset
from ascendspeed.families.family import check_heads

INTERNLM_20B = {  # as published
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "internlm",
    "num_attention_heads": 40,
    "num_hidden_layers": 60,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "rotary": {"base": 10000, "type": "dynamic"},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 103168,
}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "vocab_size": 99,
}


def llama(**more) -> ModelConfig:
    return FAMILIES["llama"].read_config(LLAMA | more)


def test_published_config_is_the_preset():
    assert family_of(INTERNLM_20B).read_config(INTERNLM_20B) == preset("internlm-20b")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name):
    config = PRESETS[name]
    theirs = FAMILIES[config.family].write_config(config)
    assert family_of(theirs).read_config(theirs) == config
    check_heads(config)


def test_v1_has_no_words_for_grouped_queries():
    theirs = FAMILIES["internlm"].write_config(PRESETS["internlm-tiny"])
    assert "num_key_value_heads" not in theirs
    assert "head_dim" not in theirs
    with pytest.raises(UserError, match="num_query_groups = 2"):
        FAMILIES["internlm"].write_config(replace(PRESETS["internlm-tiny"], num_query_groups=2))


def test_llama_spells_its_heads_out():
    theirs = FAMILIES["llama"].write_config(llama())
    assert (theirs["num_key_value_heads"], theirs["head_dim"]) == (8, 8)


def test_null_is_the_same_as_not_there():
    assert llama(head_dim=None, num_key_value_heads=None, rope_scaling=None, max_position_embeddings=None) == llama()


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "dynamic", "factor": 2.0}},
        {"rotary": {"base": 500000, "type": "dynamic", "scaling_factor": 2.0}},
    ],
)
def test_every_spelling_of_rope(spelling):
    config = llama(**spelling)
    assert (config.rotary_base, config.rope_scaling_type, config.rope_scaling_factor) == (5e5, "dynamic", 2.0)


def test_rope_of_v1():
    read = FAMILIES["internlm"].read_config
    assert read(INTERNLM_20B | {"rotary": None}).rope_scaling_type == "dynamic"  # the family's default
    assert read(INTERNLM_20B | {"rotary": {"base": 10000, "type": "origin"}}).rope_scaling_type == "none"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": 1}, "mlp_bias = 1 is not a bool"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "-1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": "dynamic"}, "not a table"),
        ({"num_hidden_layers": "2"}, "positive int"),
        ({"num_hidden_layers": 0}, "positive int"),
        ({"hidden_size": True}, "positive int"),
        ({"tie_word_embeddings": 1}, "not a bool"),
        ({"rms_norm_eps": "1e-6"}, "positive float"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"num_attention_heads": 7}, "does not split over 7"),
        ({"num_key_value_heads": 3}, "do not split over 3"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_what_cannot_be_expressed_is_refused(more, said):
    with pytest.raises(UserError, match=said):
        llama(**more)


def test_unknown_families_and_presets():
    with pytest.raises(UserError, match=r"'falcon'.*internlm.*llama"):
        family_of({"model_type": "falcon"})
    with pytest.raises(UserError, match="did you mean internlm-7b"):
        preset("internlm7b")


@pytest.mark.parametrize(
    ("name", "count"),
    [("internlm-7b", 7_321_948_160), ("internlm-65b", 66_454_298_624), ("llama-7b", 6_738_415_616), ("llama-65b", 65_285_660_672)],
)
def test_parameter_counts(name, count):
    """As published."""
    sizes = (weights.torch.Size(parameter.shape).numel() for parameter in weights.parameters(PRESETS[name]))
    assert sum(sizes) == count
