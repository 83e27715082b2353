"""Tiny models of every family."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families import PRESETS

TRAINED, LONG = 32, 48  # positions of the models, and of the tokens: half as many again


TINY = {c.family: c for name, c in PRESETS.items() if name.endswith("-tiny")}


def shrunk(model: ModelConfig, **changes) -> ModelConfig:
    """Two layers of weights that are large enough for logits to say something."""
    return replace(
        model, num_layers=2, vocab_size=125, max_position_embeddings=TRAINED, init_method_std=0.1, **changes
    )


MODELS = {name: shrunk(model) for name, model in TINY.items()} | {
    "internlm-no-bias": shrunk(TINY["internlm"], add_qkv_bias=False, add_dense_bias=False),
    "internlm2-bias": shrunk(TINY["internlm2"], add_qkv_bias=True, add_dense_bias=True),
    "internlm3-bias": shrunk(TINY["internlm3"], add_qkv_bias=True, add_dense_bias=True, add_mlp_bias=True),
    "internlm3-bias-but-qkv": shrunk(TINY["internlm3"], add_dense_bias=True, add_mlp_bias=True),
    "llama-bias": shrunk(TINY["llama"], add_qkv_bias=True, add_dense_bias=True, add_mlp_bias=True,
        rope_scaling_type="linear", rope_scaling_factor=4.0),
    "llama3.1": shrunk(TINY["llama"], rope_scaling_type="llama3", rope_scaling_factor=8.0,
        rope_original_max_position_embeddings=24, rope_high_freq_factor=3.0),
    "qwen3-yarn": shrunk(TINY["qwen3"], rope_scaling_type="yarn", rope_scaling_factor=4.0,
        rope_original_max_position_embeddings=12, rope_beta_fast=4.0),
    "qwen2-tied": shrunk(TINY["qwen2"], tie_embeddings=True),
}  # fmt: skip
