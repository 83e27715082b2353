"""Tiny mixture-of-experts models for tests."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import param_mapping

MIXTRAL = ModelConfig(
    "mixtral",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=2,
    vocab_size=125,
    max_position_embeddings=64,
    add_qkv_bias=False,
    add_dense_bias=False,
    init_method_std=0.1,
    num_experts=4,
)


QWEN2_MOE = replace(
    MIXTRAL,
    family="qwen2_moe",
    add_qkv_bias=True,
    num_experts=6,
    moe_router_topk=3,
    moe_ffn_hidden_size=24,
    moe_shared_expert_intermediate_size=40,
    moe_router_pre_softmax=True,
)


MODELS = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe, weights that add up to 1": replace(QWEN2_MOE, moe_router_pre_softmax=False),
}


def hugging_face(model: ModelConfig):
    """(class, configuration) of a model, in Hugging Face's words."""
    from transformers import (
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    own = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "initializer_range": model.init_method_std,
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model.family == "mixtral":
        return MixtralForCausalLM, MixtralConfig(**own, num_local_experts=model.num_experts)
    if model.family == "qwen3_moe":
        return Qwen3MoeForCausalLM, Qwen3MoeConfig(
            **own,
            num_experts=model.num_experts,
            moe_intermediate_size=model.moe_ffn_hidden_size,
            norm_topk_prob=not model.moe_router_pre_softmax,
            head_dim=model.head_dim,
        )
    return Qwen2MoeForCausalLM, Qwen2MoeConfig(
        **own,
        num_experts=model.num_experts,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        norm_topk_prob=not model.moe_router_pre_softmax,
    )


def loaded(model: ModelConfig, tensors: dict[str, torch.Tensor], folder: Path):
    """Hugging Face's model with our weights, by way of a directory that it loads."""
    model_class, settings = hugging_face(model)
    settings.save_pretrained(folder)
    renamed: dict[str, torch.Tensor] = {}
    for parameter in param_mapping.parameters(model):
        renamed |= param_mapping.megatron_to_hf(model, parameter, tensors[parameter.name])
    save_file(
        {name: tensor.contiguous() for name, tensor in renamed.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    reference, left = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(left[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), left
    return reference
