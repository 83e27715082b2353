"""Qwen3-MoE: Qwen3 with many small experts, and no shared one. Every layer must have experts."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, override_keys, replace_mappings
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, TINY
from ascendspeed.models.families.qwen2_moe import QWEN2_MOE, SHARED
from ascendspeed.models.families.qwen3 import IMPLICIT, QK_NORMS, REQUIRED

BASE = ModelConfig(  # Qwen3-30B-A3B
    "qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rotary_base=1e6,
    num_experts=128,
    moe_router_topk=8,
    moe_ffn_hidden_size=768,
    **IMPLICIT,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    reward_architecture="Qwen3MoeForSequenceClassification",
    config_mappings=(
        *override_keys(CONFIG_MAPPINGS, num_key_value_heads=4, max_position_embeddings=32768),
        # The alias is the name in transformers 5.
        ConfigMapping("num_experts", ("num_experts",), 128, aliases=("num_local_experts",)),
        ConfigMapping("router_aux_loss_coef", ("moe_aux_loss_coeff",), 0.0),
        ConfigMapping("num_experts_per_tok", ("moe_router_topk",), 8),
        ConfigMapping("moe_intermediate_size", ("moe_ffn_hidden_size",), 768, "expert_ffn"),
        ConfigMapping("norm_topk_prob", ("!moe_router_pre_softmax",), False),
    ),
    param_mappings=(
        *replace_mappings(
            QWEN2_MOE.param_mappings,
            without=[SHARED + name for name in ("linear_fc1.weight", "linear_fc2.weight", "gate_weight")],
        ),
        *QK_NORMS,
    ),
    required_values=REQUIRED | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    implicit_config=IMPLICIT,
    tokenizer_class="Qwen2Tokenizer",
    presets={
        "qwen3-30b-a3b": BASE,
        "qwen3-235b-a22b": replace(
            BASE,
            num_layers=94,
            hidden_size=4096,
            ffn_hidden_size=12288,
            num_attention_heads=64,
            moe_ffn_hidden_size=1536,
        ),
        "qwen3_moe-tiny": replace(
            BASE, **TINY, num_query_groups=2, kv_channels=32, num_experts=6, moe_router_topk=2,
            moe_ffn_hidden_size=88,
        ),
    },
)  # fmt: skip
