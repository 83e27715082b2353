"""Converts `ModelConfig` to megatron-core's TransformerConfig and layer spec."""

from copy import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.distributed.device import current_device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.models.gpt import moe
from ascendspeed.models.gpt.attention import RotaryAttention
from ascendspeed.models.gpt.cross_entropy import PLAIN, LossTerms
from ascendspeed.models.gpt.linear import ColumnLinear, RowLinear, use_weight_gradient
from ascendspeed.models.gpt.rope import Rope
from ascendspeed.models.gpt.router_losses import RouterLosses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GELU = partial(F.gelu, approximate="tanh")


@dataclass
class GPTConfig(TransformerConfig):
    """Megatron-core's configuration with the settings of this package's own modules."""

    kernels: Kernels = field(default_factory=Kernels)
    rope: Rope | None = None
    router_losses: RouterLosses | None = None
    loss_terms: LossTerms = PLAIN
    add_dense_bias: bool = False
    add_mlp_bias: bool = False
    scale_embeddings: bool = False
    normalize_head: bool = False
    reward_head: bool = False


class RMSNorm(torch.nn.Module):
    """RMSNorm that supports sequence parallel: its weight's gradient is summed over the tensor-parallel
    ranks."""

    def __init__(self, config: GPTConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps, self.kernel = eps, config.kernels.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h]."""
        return self.kernel(x, self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm that stores w and multiplies by 1 + w, in fp32: in bf16 the sum would lose most of w."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h]."""
        return self.kernel(x.float(), 1 + self.weight.float(), self.eps).to(x.dtype)


class HeadNorm(RMSNorm):
    """RMSNorm of heads [s, b, heads, d]. Tensor-parallel ranks have different heads, so the gradient of its
    weight is summed over them, as that of a norm is under sequence parallel."""

    def __init__(self, config: GPTConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1


class DenseLinear(RowLinear):
    """Attention output projection with its own bias setting; megatron-core uses the MLP's setting."""

    def __init__(self, *args: object, bias: bool, config: GPTConfig, **kwargs: object) -> None:
        super().__init__(*args, bias=config.add_dense_bias, config=config, **kwargs)


class GatedMLP(MLP):
    """Gated MLP: fc1 -> activation(gate) * up -> fc2, with the fused kernels of `Kernels`."""

    def __init__(self, config: GPTConfig) -> None:
        mlp_config = copy(config)
        mlp_config.add_bias_linear = (
            config.add_mlp_bias
        )  # megatron-core has one setting for attention and MLP
        super().__init__(
            mlp_config,
            MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
            ffn_hidden_size=config.ffn_hidden_size,
        )
        self.glu = config.kernels.geglu if config.activation_func is GELU else config.kernels.swiglu

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> ([s, b, h], bias that the caller must add or None)."""
        hidden, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.glu(hidden if bias is None else hidden + bias))


class NormHead(ColumnLinear):
    """Output layer with rows normalized to length 1. Tensor parallel cuts between rows, so ranks need no
    communication."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [s, b, h] -> [s, b, V / TP]; `weight` [V / TP, h] replaces the layer's own."""
        rows = F.normalize(self.weight if weight is None else weight)
        return super().forward(input_, rows, runtime_gather_output)

    @torch.no_grad()
    def fold_normalization(self) -> None:
        """Normalizes the rows once and for all, instead of in every pass; for a weight that does not change
        any more."""
        self.weight.copy_(F.normalize(self.weight))
        self.__class__ = ColumnLinear


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    dtype: str = "fp32",
    kernels: Kernels | None = None,
) -> GPTConfig:
    """Megatron-core's configuration of a run."""
    torch_dtype = DTYPES[dtype]
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    kernels = kernels or Kernels()
    weight_gradient = kernels.weight_gradient if _adds_weight_gradients(model, parallel, dtype) else None
    if weight_gradient is not None:
        use_weight_gradient(weight_gradient)
    return GPTConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        add_dense_bias=model.add_dense_bias,
        add_mlp_bias=model.add_mlp_bias,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=True,
        activation_func=GELU if model.activation == "gelu-tanh" else F.silu,
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        scale_embeddings=model.scale_embeddings,
        normalize_head=model.normalize_head,
        reward_head=model.reward_head,
        attention_dropout=train.attention_dropout,
        hidden_dropout=train.hidden_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank
        if interleaved
        else None,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # The interleaved schedule silently gives wrong losses with batched messages (megatron-core's
        # default).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # It must not free its outputs either: it continues before they are sent.
        deallocate_pipeline_outputs=parallel.pipeline_model_parallel_size > 1 and not interleaved,
        # Gradients are summed: the loss is already divided by the tokens of the global batch.
        calculate_per_token_loss=True,
        **_recompute(train),
        params_dtype=torch_dtype,
        pipeline_dtype=torch_dtype,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        # All weights are written afterwards, from files or from a layout-independent generator.
        # Megatron-core's initialisation must still run, because it marks the tensor-parallel parameters.
        init_method=_keep,
        output_layer_init_method=_keep,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=weight_gradient is not None,
        deterministic_mode=train.deterministic,
        apply_rope_fusion=False,
        kernels=kernels,
        rope=Rope(model),
        router_losses=RouterLosses.of(model),
        loss_terms=LossTerms(train.label_smoothing, train.z_loss_coeff, model.vocab_size),
        **moe.settings(model),
    )


def _adds_weight_gradients(model: ModelConfig, parallel: ParallelConfig, dtype: str) -> bool:
    """True if linears can add their weight gradients to fp32 sums: the engine keeps whole ones, and every
    linear has a weight of its own."""
    keeps_sums = not parallel.deepspeed or parallel.zero_stage == 1
    own_weights = not (model.tie_embeddings or model.normalize_head or model.num_experts)
    return dtype == "bf16" and keeps_sums and own_weights


def _recompute(train: TrainConfig) -> dict[str, object]:
    if train.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": train.recompute_method,
            "recompute_num_layers": train.recompute_num_layers,
        }
    return {
        "recompute_granularity": None
        if train.recompute_granularity == "none"
        else train.recompute_granularity
    }


def block_spec(config: GPTConfig, virtual_stage: int | None = None) -> TransformerBlockSubmodules:
    """Spec of the layers of this pipeline stage, or of one of its virtual stages."""
    norm = ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear,
                    core_attention=RotaryAttention,
                    linear_proj=DenseLinear,
                    q_layernorm=HeadNorm if config.qk_layernorm else None,
                    k_layernorm=HeadNorm if config.qk_layernorm else None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=moe.moe_spec() if config.num_moe_experts else GatedMLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(
        [layer] * get_num_layers_to_build(config, virtual_stage), layer_norm=norm
    )


def _keep(weight: Tensor) -> Tensor:
    return weight
