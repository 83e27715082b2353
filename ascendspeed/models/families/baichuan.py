"""Baichuan 2 7B: Llama with one matrix for q, k and v, and a normalized output layer."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import Family, LlamaNames, ParamMapping, override_keys, replace_mappings
from ascendspeed.models.families.llama import ATTENTION, CONFIG_MAPPINGS, LAYER, MLP, PARAM_MAPPINGS, TINY

BASE = ModelConfig(
    "baichuan",
    vocab_size=125696,
    max_position_embeddings=4096,
    norm_epsilon=1e-6,
    add_qkv_bias=False,
    add_dense_bias=False,
    normalize_head=True,
)
BIASES = (
    ATTENTION + "linear_qkv.bias",
    ATTENTION + "linear_proj.bias",
    MLP + "linear_fc1.bias",
    MLP + "linear_fc2.bias",
)

BAICHUAN = Family(
    name="baichuan",
    architecture="BaichuanForCausalLM",
    config_mappings=override_keys(
        CONFIG_MAPPINGS, without=("num_key_value_heads", "head_dim"), max_position_embeddings=4096
    ),
    param_mappings=replace_mappings(
        PARAM_MAPPINGS,
        ParamMapping(ATTENTION + "linear_qkv.weight", (LAYER + "self_attn.W_pack.weight",), "qkv", "rows"),
        without=BIASES,
    ),
    implicit_config={"add_qkv_bias": False, "add_dense_bias": False, "normalize_head": True},
    required_values={"hidden_act": "silu"},
    unsupported=(
        ({"vocab_size": 64000}, "Baichuan 1 is not supported, only Baichuan 2 7B"),
        (
            {"hidden_size": 5120},
            "Baichuan 2 13B has ALiBi, which is not supported, only the 7B with its rope",
        ),
    ),
    llama_names=LlamaNames(fused_qkv="self_attn.W_pack"),
    presets={"baichuan2-7b": BASE, "baichuan2-tiny": replace(BASE, **TINY)},
)
