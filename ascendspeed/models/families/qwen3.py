"""Qwen3: Llama with grouped queries, a normalization of every query and key head, and no biases."""

from dataclasses import replace
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import Family, ParamMapping, override_keys
from ascendspeed.models.families.llama import ATTENTION, CONFIG_MAPPINGS, LAYER, PARAM_MAPPINGS, TINY

QK_NORMS = tuple(
    ParamMapping(ATTENTION + f"{x}_layernorm.weight", (LAYER + f"self_attn.{x}_norm.weight",)) for x in "qk"
)
REQUIRED = {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}
IMPLICIT: dict[str, Any] = {"add_qkv_bias": False, "add_dense_bias": False, "qk_layernorm": True}

BASE = ModelConfig(  # Qwen3-8B
    "qwen3",
    num_layers=36,
    ffn_hidden_size=12288,
    num_query_groups=8,
    vocab_size=151936,
    max_position_embeddings=40960,
    rotary_base=1e6,
    **IMPLICIT,
)
SMALL = replace(BASE, num_attention_heads=16, kv_channels=128, tie_embeddings=True)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    reward_architecture="Qwen3ForSequenceClassification",
    config_mappings=override_keys(
        CONFIG_MAPPINGS, num_key_value_heads=32, head_dim=128, max_position_embeddings=32768
    ),
    param_mappings=(*PARAM_MAPPINGS, *QK_NORMS),
    implicit_config=IMPLICIT,
    required_values=REQUIRED,
    tokenizer_class="Qwen2Tokenizer",
    presets={
        "qwen3-0.6b": replace(SMALL, num_layers=28, hidden_size=1024, ffn_hidden_size=3072),
        "qwen3-1.7b": replace(SMALL, num_layers=28, hidden_size=2048, ffn_hidden_size=6144),
        "qwen3-4b": replace(SMALL, num_attention_heads=32, hidden_size=2560, ffn_hidden_size=9728),
        "qwen3-8b": BASE,
        "qwen3-14b": replace(
            BASE, num_layers=40, hidden_size=5120, ffn_hidden_size=17408, num_attention_heads=40
        ),
        "qwen3-32b": replace(
            BASE,
            num_layers=64,
            hidden_size=5120,
            ffn_hidden_size=25600,
            num_attention_heads=64,
            kv_channels=128,
        ),
        "qwen3-tiny": replace(BASE, **TINY, num_query_groups=2, kv_channels=32),
    },
)
