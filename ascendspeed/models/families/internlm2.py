"""InternLM2 and 2.5: Llama with grouped queries and its own tensor names; `wqkv` has Megatron's row order."""

from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.base import ConfigMapping, Family, LlamaNames, ParamMapping, override_keys
from ascendspeed.models.families.gguf_names import GgufArchitecture
from ascendspeed.models.families.llama import ATTENTION, CONFIG_MAPPINGS, LAYER, MLP, TINY

W = LAYER + "feed_forward.w"
BASE = ModelConfig(  # the 7B, 2 and 2.5
    "internlm2",
    ffn_hidden_size=14336,
    num_query_groups=8,
    vocab_size=92544,
    max_position_embeddings=32768,
    norm_epsilon=1e-5,
    rotary_base=1e6,
    rope_scaling_type="dynamic",
    rope_scaling_factor=2.0,
    add_qkv_bias=False,
    add_dense_bias=False,
)
SMALL = replace(BASE, num_layers=24, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16)  # 1.8B
# Revisions of the 20B differ in the factor (none, 2, 3), which only matters beyond the training length.
LARGE = replace(BASE, num_layers=48, hidden_size=6144, ffn_hidden_size=16384, num_attention_heads=48)

INTERNLM2 = Family(
    name="internlm2",
    architecture="InternLM2ForCausalLM",
    reward_architecture="InternLM2ForRewardModel",
    reward_param="v_head.weight",
    config_mappings=(
        *override_keys(CONFIG_MAPPINGS, without=("head_dim",)),
        ConfigMapping("bias", ("add_qkv_bias", "add_dense_bias"), True),
    ),
    param_mappings=(
        ParamMapping("embedding.word_embeddings.weight", ("model.tok_embeddings.weight",), partition="vocab"),
        ParamMapping("decoder.layers.{l}.input_layernorm.weight", (LAYER + "attention_norm.weight",)),
        ParamMapping(ATTENTION + "linear_qkv.weight", (LAYER + "attention.wqkv.weight",), partition="rows"),
        ParamMapping(
            ATTENTION + "linear_qkv.bias",
            (LAYER + "attention.wqkv.bias",),
            partition="rows",
            condition="add_qkv_bias",
        ),
        ParamMapping(ATTENTION + "linear_proj.weight", (LAYER + "attention.wo.weight",), partition="columns"),
        ParamMapping(
            ATTENTION + "linear_proj.bias", (LAYER + "attention.wo.bias",), condition="add_dense_bias"
        ),
        ParamMapping("decoder.layers.{l}.pre_mlp_layernorm.weight", (LAYER + "ffn_norm.weight",)),
        ParamMapping(MLP + "linear_fc1.weight", (W + "1.weight", W + "3.weight"), "glu", "rows"),
        ParamMapping(MLP + "linear_fc2.weight", (W + "2.weight",), partition="columns"),
        ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",)),
        ParamMapping(
            "output_layer.weight", ("output.weight",), partition="vocab", condition="!tie_embeddings"
        ),
    ),
    required_values={"hidden_act": "silu"},
    chat_template="v2",
    llama_names=LlamaNames(
        renames=(
            ("tok_embeddings", "embed_tokens"),
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attention.wo.", "self_attn.o_proj."),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("output.", "lm_head."),
        ),
        fused_qkv="attention.wqkv",
        qkv_order="grouped",
    ),
    internevo_types=("INTERNLM2", "LLAMA2"),
    internevo_aliases=("INTERNLM2_PUBLIC", "INTERNLM2"),
    gguf_architecture=GgufArchitecture("internlm2", name_with_biases="llama"),
    extra_formats=("hf-llama", "mindformers"),
    presets={
        "internlm2-1.8b": SMALL,
        "internlm2-7b": BASE,
        "internlm2-20b": LARGE,
        "internlm2.5-1.8b": SMALL,
        "internlm2.5-7b": BASE,
        "internlm2.5-20b": LARGE,
        # Publications differ in base and factor; the model's config.json is authoritative, and `--load` reads
        # it.
        "internlm2.5-7b-1m": replace(
            BASE, max_position_embeddings=262144, rotary_base=5e7, rope_scaling_factor=2.5
        ),
        "internlm2-tiny": replace(BASE, **TINY, num_query_groups=2),
    },
)
