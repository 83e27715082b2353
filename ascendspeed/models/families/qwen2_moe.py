"""Qwen2-MoE: many small experts, and a gated shared expert for every token.

Every layer must have experts; a model with dense layers (`mlp_only_layers`, `decoder_sparse_step`) is
refused.
"""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, ParamMapping, override_keys
from ascendspeed.models.families.llama import CONFIG_MAPPINGS, LAYER, MLP, TINY
from ascendspeed.models.families.mixtral import EXPERT, sparse

SHARED = MLP + "shared_experts."
HF_EXPERT, HF_SHARED = LAYER + "mlp.experts.{e}.", LAYER + "mlp.shared_expert."

BASE = ModelConfig(  # Qwen1.5-MoE-A2.7B
    "qwen2_moe",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=16,
    vocab_size=151936,
    max_position_embeddings=8192,
    rotary_base=1e6,
    add_dense_bias=False,
    num_experts=60,
    moe_router_topk=4,
    moe_ffn_hidden_size=1408,
    moe_shared_expert_intermediate_size=5632,
    moe_router_pre_softmax=True,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    reward_architecture="Qwen2MoeForSequenceClassification",
    config_mappings=(
        *override_keys(
            CONFIG_MAPPINGS, without=["head_dim"], num_key_value_heads=16, max_position_embeddings=32768
        ),
        ConfigMapping("qkv_bias", ("add_qkv_bias",), True),
        ConfigMapping("num_experts", ("num_experts",), 60),
        ConfigMapping("router_aux_loss_coef", ("moe_aux_loss_coeff",), 0.0),
        ConfigMapping("num_experts_per_tok", ("moe_router_topk",), 4),
        ConfigMapping("moe_intermediate_size", ("moe_ffn_hidden_size",), 1408, "expert_ffn"),
        ConfigMapping("shared_expert_intermediate_size", ("moe_shared_expert_intermediate_size",), 5632),
        ConfigMapping("norm_topk_prob", ("!moe_router_pre_softmax",), False),
    ),
    param_mappings=sparse(
        ParamMapping(MLP + "router.weight", (LAYER + "mlp.gate.weight",)),
        ParamMapping(
            EXPERT + "linear_fc1.weight",
            (HF_EXPERT + "gate_proj.weight", HF_EXPERT + "up_proj.weight"),
            "glu",
            "rows",
        ),
        ParamMapping(EXPERT + "linear_fc2.weight", (HF_EXPERT + "down_proj.weight",), partition="columns"),
        ParamMapping(
            SHARED + "linear_fc1.weight",
            (HF_SHARED + "gate_proj.weight", HF_SHARED + "up_proj.weight"),
            "glu",
            "rows",
        ),
        ParamMapping(SHARED + "linear_fc2.weight", (HF_SHARED + "down_proj.weight",), partition="columns"),
        ParamMapping(SHARED + "gate_weight", (LAYER + "mlp.shared_expert_gate.weight",)),
    ),
    required_values={
        "hidden_act": "silu",
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    implicit_config={"add_dense_bias": False},
    tokenizer_class="Qwen2Tokenizer",
    presets={
        "qwen1.5-moe-a2.7b": BASE,
        "qwen2-57b-a14b": replace(
            BASE,
            num_layers=28,
            hidden_size=3584,
            ffn_hidden_size=18944,
            num_attention_heads=28,
            num_query_groups=4,
            max_position_embeddings=131072,
            num_experts=64,
            moe_router_topk=8,
            moe_ffn_hidden_size=2560,
            moe_shared_expert_intermediate_size=20480,
        ),
        "qwen2_moe-tiny": replace(
            BASE,
            **TINY,
            num_query_groups=2,
            num_experts=6,
            moe_router_topk=2,
            moe_ffn_hidden_size=88,
            moe_shared_expert_intermediate_size=176,
        ),
    },
)
