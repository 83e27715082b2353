"""Group `model` of a run: the architecture."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tyro.conf import Suppress


@dataclass(frozen=True)
class ModelConfig:
    """Model architecture: the contents of a Hugging Face `config.json` under Megatron's names. Flags override
    `--model`."""

    family: Suppress[str] = "internlm"
    """Entry of `ascendspeed.models.families`."""
    num_layers: int = 32
    """Transformer layers."""
    hidden_size: int = 4096
    """Width h of the residual stream."""
    ffn_hidden_size: int = 11008
    """Inner width f of the SwiGLU MLP."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads for grouped-query attention; None: as many as query heads."""
    kv_channels: int | None = None
    """Width of one head; None: hidden size / heads."""
    vocab_size: int = 103168
    """Rows of the vocabulary, before padding for tensor parallel."""
    max_position_embeddings: int = 2048
    """Longest training sequence; dynamic rope scaling starts above it."""
    norm_epsilon: float = 1e-6
    """Epsilon of RMSNorm."""
    rotary_base: float = 10000.0
    """Base (theta) of the rotary embedding."""
    rope_scaling_type: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """Scaling of the rotary embedding: of all positions (linear), of the base beyond the trained length
    (dynamic), of low frequencies (llama3, of Llama 3.1 and later), or of low frequencies and of attention
    (yarn)."""
    rope_scaling_factor: float = 1.0
    """Factor of the rope scaling."""
    rope_original_max_position_embeddings: int | None = None
    """Types llama3 and yarn: length L of the training before the scaling."""
    rope_low_freq_factor: float = 1.0
    """Type llama3: wavelengths above L / this are scaled by the factor."""
    rope_high_freq_factor: float = 4.0
    """Type llama3: wavelengths below L / this are not scaled; those between are scaled in part."""
    rope_beta_fast: float = 32.0
    """Type yarn: frequencies that turn more than this often over L are not scaled."""
    rope_beta_slow: float = 1.0
    """Type yarn: frequencies that turn less than this often over L are scaled by the factor; those between
    are scaled in part."""
    rope_attention_factor: float | None = None
    """Type yarn: factor of cos and sin, whose square multiplies the attention scores; None: 0.1 ln(factor) +
    1."""
    add_qkv_bias: bool = True
    """Bias on the query, key and value projections (InternLM 7B and 65B have it)."""
    add_dense_bias: bool = True
    """Bias on the attention's output projection (InternLM 7B and 65B have it)."""
    add_mlp_bias: bool = False
    """Bias on the projections of the MLP (InternLM3 with `bias`)."""
    qk_layernorm: bool = False
    """RMSNorm of every query and key head before the rotary embedding (Qwen3)."""
    tie_embeddings: bool = False
    """Use the embedding as the output layer as well."""
    activation: Literal["silu", "gelu-tanh"] = "silu"
    """Activation of the gated MLP: SwiGLU, or GeGLU by the tanh approximation (Gemma)."""
    zero_centered_norm: bool = False
    """RMSNorm keeps w and multiplies by 1 + w (Gemma)."""
    scale_embeddings: bool = False
    """Multiply the embeddings by the square root of the hidden size (Gemma)."""
    normalize_head: bool = False
    """Normalize every row of the output layer to length 1 (Baichuan 2's NormHead)."""
    num_experts: int | None = None
    """Experts in every MLP; None: a dense model."""
    moe_router_topk: int = 2
    """Experts that a token is sent to."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of one expert; None: --ffn-hidden-size."""
    moe_shared_expert_intermediate_size: int | None = None
    """Inner width of the gated shared expert, which every token is sent to; None: no shared expert."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the top ones are selected (Qwen2-MoE); else over the selected ones
    (Mixtral)."""
    moe_aux_loss_coeff: float = 0.0
    """Coefficient of the experts' load-balancing loss, as router_aux_loss_coef of config.json: a mean over
    layers and rows of Hugging Face's load_balancing_loss_func; 0: no such loss."""
    moe_z_loss_coeff: float = 0.0
    """Coefficient of the router's z-loss, a mean over layers and rows of log² of the sum of exp(scores)."""
    init_method_std: float = 0.02
    """Standard deviation of random weights; divided by sqrt(2 * layers) for residual projections."""
    reward_head: Suppress[bool] = False
    """The model is a reward model: its output layer gives one score for every position."""
    scored_token_id: Suppress[int | None] = None
    """Reward model: token after the text, at whose position the score is read; None: at the last token."""

    def __post_init__(self) -> None:
        # Canonical form: equal architectures compare equal, and `replace` of the heads keeps the ratio.
        if self.num_query_groups == self.num_attention_heads:
            object.__setattr__(self, "num_query_groups", None)
        if self.kv_channels is not None and self.kv_channels * self.num_attention_heads == self.hidden_size:
            object.__setattr__(self, "kv_channels", None)
        if self.reward_head:  # no output layer that could be tied
            object.__setattr__(self, "tie_embeddings", False)

    def same_function(self, other: "ModelConfig") -> bool:
        """True if two models differ at most in fields that only training reads."""
        return replace(self, **TRAINING_FIELDS) == replace(other, **TRAINING_FIELDS)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def expert_ffn(self) -> int:
        """Inner width of one expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """Inner widths of the MLPs of a layer: the dense one, or an expert and the shared expert."""
        shared = self.moe_shared_expert_intermediate_size
        return (
            (self.ffn_hidden_size,)
            if self.num_experts is None
            else (self.expert_ffn, *((shared,) if shared else ()))
        )


TRAINING_FIELDS: dict[str, Any] = {
    "init_method_std": 0.02,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": 0.0,
}
"""Fields of `ModelConfig` that only training reads, with their defaults."""
