"""InternLM3: Llama with an explicit head width and two settings for biases: q, k, v; output projection and
MLP."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, override_keys
from ascendspeed.models.families.gguf_names import GgufArchitecture
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, PARAM_MAPPINGS, TINY

BASE = ModelConfig(  # the 8B
    "internlm3",
    num_layers=48,
    ffn_hidden_size=10240,
    num_query_groups=2,
    vocab_size=128512,
    max_position_embeddings=32768,
    norm_epsilon=1e-5,
    rotary_base=5e7,
    rope_scaling_type="dynamic",
    rope_scaling_factor=6.0,
    add_qkv_bias=False,
    add_dense_bias=False,
)

INTERNLM3 = Family(
    name="internlm3",
    architecture="InternLM3ForCausalLM",
    config_mappings=(
        *override_keys(CONFIG_MAPPINGS, max_position_embeddings=32768),
        ConfigMapping(
            "qkv_bias", ("add_qkv_bias",), False, aliases=("attention_bias",)
        ),  # aliases are the names in transformers 5
        ConfigMapping("bias", ("add_dense_bias", "add_mlp_bias"), False, aliases=("mlp_bias",)),
    ),
    param_mappings=PARAM_MAPPINGS,
    required_values={"hidden_act": "silu"},
    chat_template="v3",
    internevo_types=("LLAMA2",),
    internevo_aliases=("INTERNLM3", "INTERNLM3_PUBLIC"),
    gguf_architecture=GgufArchitecture("llama"),
    extra_formats=("hf-llama",),
    presets={
        "internlm3-8b": BASE,
        "internlm3-tiny": replace(BASE, **TINY, num_query_groups=2, kv_channels=32),
    },
)
