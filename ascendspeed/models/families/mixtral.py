"""Mixtral: Llama with eight experts per MLP, two of which process each token."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, ParamMapping, override_keys
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, LAYER, MLP, PARAM_MAPPINGS, TINY

EXPERT = MLP + "experts.local_experts.{e}."


def sparse(*experts: ParamMapping) -> tuple[ParamMapping, ...]:
    """Llama's mappings with `experts` in place of the dense MLP."""
    first = next(i for i, mapping in enumerate(PARAM_MAPPINGS) if mapping.megatron_param.startswith(MLP))
    after = (mapping for mapping in PARAM_MAPPINGS[first:] if not mapping.megatron_param.startswith(MLP))
    return (*PARAM_MAPPINGS[:first], *experts, *after)


W = LAYER + "block_sparse_moe.experts.{e}.w"

BASE = ModelConfig(  # the 8x7B
    "mixtral",
    ffn_hidden_size=14336,
    num_query_groups=8,
    vocab_size=32000,
    max_position_embeddings=32768,
    norm_epsilon=1e-5,
    rotary_base=1e6,
    add_qkv_bias=False,
    add_dense_bias=False,
    num_experts=8,
)

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    reward_architecture="MixtralForSequenceClassification",
    config_mappings=(
        *override_keys(
            CONFIG_MAPPINGS, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5
        ),
        ConfigMapping("num_local_experts", ("num_experts",), 8),
        ConfigMapping("router_aux_loss_coef", ("moe_aux_loss_coeff",), 0.0),
        ConfigMapping("num_experts_per_tok", ("moe_router_topk",), 2),
    ),
    param_mappings=sparse(
        ParamMapping(MLP + "router.weight", (LAYER + "block_sparse_moe.gate.weight",)),
        ParamMapping(EXPERT + "linear_fc1.weight", (W + "1.weight", W + "3.weight"), "glu", "rows"),
        ParamMapping(EXPERT + "linear_fc2.weight", (W + "2.weight",), partition="columns"),
    ),
    required_values={"hidden_act": "silu", "router_jitter_noise": 0.0},
    implicit_config={"add_qkv_bias": False, "add_dense_bias": False},
    rope_default={"base": 1e6},
    refused_keys=("quantization_config", "sliding_window"),
    tokenizer_class="LlamaTokenizer",
    presets={
        "mixtral-8x7b": BASE,
        "mixtral-8x22b": replace(
            BASE,
            num_layers=56,
            hidden_size=6144,
            ffn_hidden_size=16384,
            num_attention_heads=48,
            max_position_embeddings=65536,
        ),
        "mixtral-tiny": replace(BASE, **TINY | {"ffn_hidden_size": 176}, num_query_groups=2, num_experts=4),
    },
)
