"""Qwen2 and 2.5: Llama with grouped queries and biases on q, k and v only."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import Family, override_keys
from ascendspeed.models.families.gguf_names import GgufArchitecture
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, PARAM_MAPPINGS, TINY

BASE = ModelConfig(  # Qwen2-7B
    "qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    vocab_size=152064,
    max_position_embeddings=131072,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    add_dense_bias=False,
)

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    reward_architecture="Qwen2ForSequenceClassification",
    config_mappings=override_keys(CONFIG_MAPPINGS, max_position_embeddings=32768),
    param_mappings=PARAM_MAPPINGS,
    implicit_config={"add_qkv_bias": True, "add_dense_bias": False},
    required_values={"hidden_act": "silu", "use_sliding_window": False},
    tokenizer_class="Qwen2Tokenizer",
    requires_tokenizer_class=True,
    gguf_architecture=GgufArchitecture("qwen2", interleaved=False),
    presets={
        "qwen2-0.5b": replace(
            BASE,
            num_layers=24,
            hidden_size=896,
            ffn_hidden_size=4864,
            num_attention_heads=14,
            num_query_groups=2,
            vocab_size=151936,
            tie_embeddings=True,
        ),
        "qwen2-1.5b": replace(
            BASE,
            hidden_size=1536,
            ffn_hidden_size=8960,
            num_attention_heads=12,
            num_query_groups=2,
            vocab_size=151936,
            tie_embeddings=True,
        ),
        "qwen2-7b": BASE,
        "qwen2-72b": replace(
            BASE,
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=29568,
            num_attention_heads=64,
            num_query_groups=8,
            norm_epsilon=1e-5,
        ),
        "qwen2-tiny": replace(BASE, **TINY, num_query_groups=2),
    },
)
