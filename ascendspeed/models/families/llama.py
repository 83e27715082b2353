"""Llama: the entry that most other families extend."""

from dataclasses import replace
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, ParamMapping
from ascendspeed.models.families.gguf_names import GgufArchitecture

ATTENTION, MLP = "decoder.layers.{l}.self_attention.", "decoder.layers.{l}.mlp."
LAYER = "model.layers.{l}."
QKV = tuple(LAYER + f"self_attn.{x}_proj." for x in "qkv")

CONFIG_MAPPINGS = (
    ConfigMapping("num_hidden_layers", ("num_layers",)),
    ConfigMapping("hidden_size", ("hidden_size",)),
    ConfigMapping("intermediate_size", ("ffn_hidden_size",)),
    ConfigMapping("num_attention_heads", ("num_attention_heads",)),
    ConfigMapping("num_key_value_heads", ("num_query_groups",), None, "kv_heads"),
    ConfigMapping("head_dim", ("kv_channels",), None, "head_dim"),
    ConfigMapping("vocab_size", ("vocab_size",)),
    ConfigMapping("max_position_embeddings", ("max_position_embeddings",), 2048),
    ConfigMapping("rms_norm_eps", ("norm_epsilon",), 1e-6),
    ConfigMapping("tie_word_embeddings", ("tie_embeddings",), False),
    ConfigMapping("initializer_range", ("init_method_std",), 0.02),
)

TINY: dict[str, Any] = {  # sizes of every family's smallest preset, for tests and experiments
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
}

PARAM_MAPPINGS = (
    ParamMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), partition="vocab"),
    ParamMapping("decoder.layers.{l}.input_layernorm.weight", (LAYER + "input_layernorm.weight",)),
    ParamMapping(ATTENTION + "linear_qkv.weight", tuple(x + "weight" for x in QKV), "qkv", "rows"),
    ParamMapping(
        ATTENTION + "linear_qkv.bias", tuple(x + "bias" for x in QKV), "qkv", "rows", condition="add_qkv_bias"
    ),
    ParamMapping(ATTENTION + "linear_proj.weight", (LAYER + "self_attn.o_proj.weight",), partition="columns"),
    ParamMapping(
        ATTENTION + "linear_proj.bias", (LAYER + "self_attn.o_proj.bias",), condition="add_dense_bias"
    ),
    ParamMapping("decoder.layers.{l}.pre_mlp_layernorm.weight", (LAYER + "post_attention_layernorm.weight",)),
    ParamMapping(
        MLP + "linear_fc1.weight",
        (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        "glu",
        "rows",
    ),
    ParamMapping(
        MLP + "linear_fc1.bias",
        (LAYER + "mlp.gate_proj.bias", LAYER + "mlp.up_proj.bias"),
        "glu",
        "rows",
        condition="add_mlp_bias",
    ),
    ParamMapping(MLP + "linear_fc2.weight", (LAYER + "mlp.down_proj.weight",), partition="columns"),
    ParamMapping(MLP + "linear_fc2.bias", (LAYER + "mlp.down_proj.bias",), condition="add_mlp_bias"),
    ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ParamMapping("output_layer.weight", ("lm_head.weight",), partition="vocab", condition="!tie_embeddings"),
)

BASE = ModelConfig(
    "llama", vocab_size=32000, norm_epsilon=1e-6, add_qkv_bias=False, add_dense_bias=False
)  # LLaMA-7B
BASE2 = replace(BASE, max_position_embeddings=4096, norm_epsilon=1e-5)  # Llama 2 7B
B13: dict[str, Any] = {
    "num_layers": 40,
    "hidden_size": 5120,
    "ffn_hidden_size": 13824,
    "num_attention_heads": 40,
}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    reward_architecture="LlamaForSequenceClassification",
    config_mappings=(
        *CONFIG_MAPPINGS,
        ConfigMapping("attention_bias", ("add_qkv_bias", "add_dense_bias"), False),
        ConfigMapping("mlp_bias", ("add_mlp_bias",), False),
    ),
    param_mappings=PARAM_MAPPINGS,
    required_values={"hidden_act": "silu"},
    tokenizer_class="LlamaTokenizer",
    internevo_types=("LLAMA2",),
    gguf_architecture=GgufArchitecture("llama"),
    extra_formats=("hf-llama", "mindformers"),
    presets={
        "llama-7b": BASE,
        "llama-13b": replace(BASE, **B13),
        "llama-30b": replace(
            BASE, num_layers=60, hidden_size=6656, ffn_hidden_size=17920, num_attention_heads=52
        ),
        "llama-65b": replace(
            BASE, num_layers=80, hidden_size=8192, ffn_hidden_size=22016, num_attention_heads=64
        ),
        "llama2-7b": BASE2,
        "llama2-13b": replace(BASE2, **B13),
        "llama2-70b": replace(
            BASE2,
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=28672,
            num_attention_heads=64,
            num_query_groups=8,
        ),
        "llama-tiny": replace(BASE2, **TINY, num_query_groups=2),
    },
)
