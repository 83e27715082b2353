"""Memory, FLOPs and disk of a run from its configuration alone, before anything is launched. No torch."""

import re
from dataclasses import dataclass
from typing import Literal

from ascendspeed.config import ModelConfig, ParallelConfig, padded_vocab_size

CHECKPOINT_BYTES = 12
"""Per parameter on disk: fp32 master, exp_avg, exp_avg_sq; whatever the engine, layout and compute type."""

# Dense bf16 TFLOP/s from the makers' data sheets, first match first. Only devices whose name says which variant it is:
# Ascend's do not (one 910B is 280, another 376), so there is no MFU for them until a peak is measured.
PEAKS = (
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bG?H200 NVL\b", 835.0),
    (r"\b(H100|H200|GH200|H800)\b", 989.0),
    (r"\b(A100|A800)\b", 312.0),
    (r"\bA30\b", 165.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX 4090\b(?! D)", 165.2),
)


@dataclass(frozen=True)
class ModelStates:
    """Bytes per device that stay for the whole run; activations and buffers come on top."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.weights + self.gradients + self.optimizer


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    cut, replicated = _layer(model)
    copies = 1 if model.tie_embeddings else 2
    return model.num_layers * (cut + replicated) + copies * model.vocab_size * model.hidden_size + model.hidden_size


def parameters_per_device(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Parameters of the fullest tensor- and pipeline-parallel rank: its share, padded vocabulary and replicated ones included."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cut, replicated = _layer(model)
    vocabulary = padded_vocab_size(model, parallel) * model.hidden_size // tp
    copies = 1 if pp > 1 or model.tie_embeddings else 2
    return -(-model.num_layers // pp) * (cut // tp + replicated) + copies * vocabulary + model.hidden_size


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of one trained token, forward and backward: 6 per weight that multiplies, and causal attention.

    Recomputation is not counted: it is no useful work.
    """
    h, q, kv = model.hidden_size, model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
    layer = 2 * h * q + 2 * h * kv + h * _mlp_width(model, model.moe_router_topk) + _routing(model)
    return 6.0 * (model.num_layers * layer + h * model.vocab_size) + 6.0 * model.num_layers * q * seq_length


def model_states(
    model: ModelConfig,
    parallel: ParallelConfig,
    data_parallel: int,
    dtype: Literal["bf16", "fp16", "fp32"],
    *,
    fp32_gradients: bool = False,
) -> ModelStates:
    """What ZeRO `parallel.zero_stage` keeps on each device, for `data_parallel` replicas.

    `fp32_gradients`: accumulated in fp32 under bf16, which adds 2 bytes per gradient kept.
    The master is a copy of the weights, in fp32 as well; only stage 0 in fp32 has none.
    """
    count, stage = parameters_per_device(model, parallel), parallel.zero_stage
    width = 4 if dtype == "fp32" else 2
    gradient = width + (2 if fp32_gradients and dtype == "bf16" else 0)
    adam, master = 8, 0 if dtype == "fp32" and stage == 0 else 4
    shares = [1 / data_parallel if stage >= least else 1 for least in (3, 2, 1)]
    return ModelStates(*(count * size * share for size, share in zip((width, gradient, adam + master), shares, strict=True)))


def checkpoint_bytes(model: ModelConfig) -> int:
    """Size of one training checkpoint on disk."""
    return CHECKPOINT_BYTES * parameter_count(model)


def known_peak(device_name: str) -> float | None:
    """Dense bf16 (and fp16) TFLOP/s of a device by the name that its driver gives; None where it is not surely known."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def _layer(model: ModelConfig) -> tuple[int, int]:
    """Parameters of one layer: those that tensor parallel cuts, and those that every rank has."""
    h, q, kv = model.hidden_size, model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
    qkv = q + 2 * kv
    cut = qkv * h + q * h + h * _mlp_width(model, model.num_experts or 0) + (qkv if model.add_qkv_bias else 0)
    return cut, 2 * h + (h if model.add_dense_bias else 0) + _routing(model)


def _mlp_width(model: ModelConfig, experts: int) -> int:
    """Gate, up and down, together, of one layer's MLP, or of `experts` of its experts and the shared one."""
    if model.num_experts is None:
        return 3 * model.ffn_hidden_size
    return 3 * (experts * model.expert_ffn + (model.moe_shared_expert_intermediate_size or 0))


def _routing(model: ModelConfig) -> int:
    """Weights of one layer's router and of the shared expert's gate."""
    return model.hidden_size * ((model.num_experts or 0) + (model.moe_shared_expert_intermediate_size is not None))
