"""Tiny models of every InternLM version, the project's and Hugging Face's, and prompts for them."""

from dataclasses import replace
from typing import Any

from ascendspeed.config.schema import ModelConfig
from helpers import oracle
from helpers.generation import language_model
from helpers.models import INTERNLM, tensors_of

SHAPE: dict[str, Any] = {"num_attention_heads": 8, "max_position_embeddings": 64}
PLAIN: dict[str, Any] = {
    **SHAPE,
    "num_query_groups": 2,
    "add_qkv_bias": False,
    "add_dense_bias": False,
    "norm_epsilon": 1e-5,
}
MODELS: dict[str, ModelConfig] = {
    "v1": replace(INTERNLM, **SHAPE, rope_scaling_type="dynamic"),
    "v2": replace(
        INTERNLM,
        **PLAIN,
        family="internlm2",
        rotary_base=1e6,
        rope_scaling_type="dynamic",
        rope_scaling_factor=2.0,
    ),
    "v2.5": replace(INTERNLM, **PLAIN, family="internlm2", rotary_base=5e7),
    "v3": replace(
        INTERNLM,
        **PLAIN,
        family="internlm3",
        kv_channels=16,
        rotary_base=5e7,
        rope_scaling_type="dynamic",
        rope_scaling_factor=6.0,
    ),
}
PROMPTS = [[1, 5, 9, 33, 7, 2, 8], [1, 4], [1, *range(80, 101)], [1, 60, 61], [1, 60, 61]]
SHARED = [1, *range(2, 40)]
REQUESTS = [([*SHARED, i, 3], [x]) for i in range(6) for x in (5, 6)] + [
    (SHARED, [9, 8, 7]),
    ([4], [5, 6]),
    (SHARED[:20], [21]),
]


def model_and_reference(cpu, name: str):
    """The project's model and Hugging Face's, with the same random weights."""
    tensors = tensors_of(MODELS[name])
    return language_model(cpu, MODELS[name], tensors), hugging_face(
        MODELS[name], tensors, rope_of(MODELS[name])
    )


def hugging_face(model: ModelConfig, tensors, rope: dict[str, Any] | None):
    """Hugging Face's model: every version of InternLM is a Llama with other parameter names."""
    return oracle.hugging_face(
        replace(model, family="internlm" if model.add_qkv_bias else "llama"), tensors, rope
    ).eval()


def rope_of(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling_type == "none":
        return None
    return {
        "rope_type": model.rope_scaling_type,
        "rope_theta": model.rotary_base,
        "factor": model.rope_scaling_factor,
    }
