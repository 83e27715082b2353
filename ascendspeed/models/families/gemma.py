"""Gemma 1: Llama with GeGLU, 1 + w norms, scaled and tied embeddings, and wide heads."""

from dataclasses import replace
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, override_keys
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, PARAM_MAPPINGS, TINY

SPECIAL: dict[str, Any] = {"activation": "gelu-tanh", "zero_centered_norm": True, "scale_embeddings": True}
BASE = ModelConfig(  # the 7B
    "gemma",
    num_layers=28,
    hidden_size=3072,
    ffn_hidden_size=24576,
    num_attention_heads=16,
    kv_channels=256,
    vocab_size=256000,
    max_position_embeddings=8192,
    norm_epsilon=1e-6,
    add_qkv_bias=False,
    add_dense_bias=False,
    tie_embeddings=True,
    **SPECIAL,
)
ONE_GROUP = replace(BASE, num_attention_heads=8, num_query_groups=1)

GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    reward_architecture="GemmaForSequenceClassification",
    config_mappings=(
        *override_keys(CONFIG_MAPPINGS, max_position_embeddings=8192, tie_word_embeddings=True, head_dim=256),
        ConfigMapping("attention_bias", ("add_qkv_bias", "add_dense_bias"), False),
    ),
    param_mappings=PARAM_MAPPINGS,
    implicit_config=SPECIAL,
    required_values={
        "hidden_act": (
            "gelu_pytorch_tanh",
            "gelu",
        ),  # early config.json files say gelu for the tanh approximation
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
    },
    tokenizer_class="GemmaTokenizer",
    presets={
        "gemma-2b": replace(ONE_GROUP, num_layers=18, hidden_size=2048, ffn_hidden_size=16384),
        "gemma-7b": BASE,
        "gemma-tiny": replace(ONE_GROUP, **TINY, kv_channels=32),
    },
)
