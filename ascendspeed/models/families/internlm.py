"""InternLM v1: Llama with biases on q, k, v and o (7B, 65B) and dynamic NTK rope."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, LlamaNames, override_keys
from ascendspeed.models.families.gguf_names import GgufArchitecture
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, PARAM_MAPPINGS, TINY

BASE = ModelConfig(
    "internlm", rope_scaling_type="dynamic"
)  # the 7B; its values are the defaults of ModelConfig

INTERNLM = Family(
    name="internlm",
    architecture="InternLMForCausalLM",
    config_mappings=(
        *override_keys(CONFIG_MAPPINGS, without=("num_key_value_heads", "head_dim")),
        ConfigMapping("bias", ("add_qkv_bias", "add_dense_bias"), True),
    ),
    param_mappings=PARAM_MAPPINGS,
    required_values={"hidden_act": "silu"},
    rope_spelling="rotary",
    rope_default={"base": 10000, "type": "dynamic", "factor": 1.0},
    chat_template="v1",
    llama_names=LlamaNames(),
    internevo_types=("INTERNLM", "LLAMA2"),
    gguf_architecture=GgufArchitecture("llama"),
    extra_formats=("hf-llama", "mindformers"),
    presets={
        "internlm-7b": BASE,
        "internlm-20b": replace(
            BASE,
            num_layers=60,
            hidden_size=5120,
            ffn_hidden_size=13824,
            num_attention_heads=40,
            max_position_embeddings=4096,
            add_qkv_bias=False,
            add_dense_bias=False,
        ),
        "internlm-65b": replace(
            BASE,
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=22016,
            num_attention_heads=64,
            rope_scaling_type="none",
        ),
        "internlm-tiny": replace(BASE, **TINY),
    },
)
