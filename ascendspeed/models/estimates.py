"""Memory, FLOPs and disk of a run from its configuration alone, before anything is launched. No torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig, padded_vocab_size
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import ParamMapping, param_shape
from ascendspeed.models.lora import targets

EMBEDDING = "embedding.word_embeddings.weight"

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
    return sum(math.prod(shape) * copies for _, shape, copies in _table(model))


def active_parameter_count(model: ModelConfig) -> int:
    """Parameters that one token meets: of the experts, those that it is sent to."""
    return sum(math.prod(shape) * copies for _, shape, copies in _table(model, active=True))


def parameters_per_device(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Parameters of the fullest tensor- and pipeline-parallel rank: its share, padded vocabulary and replicated ones included."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = first = last = 0
    for row, shape, copies in _table(model):
        shape = (padded_vocab_size(model, parallel), *shape[1:]) if row.partition == "vocab" else shape
        size = copies * math.prod(shape) // (1 if row.partition == "replicated" else tp)
        if "{l}" in row.megatron_param:
            layers += size // model.num_layers * -(-model.num_layers // pp)
        elif row.megatron_param == EMBEDDING:
            first += size
            last += size if pp > 1 and model.tie_embeddings else 0  # the output layer's copy
        else:
            last += size
    return layers + (first + last if pp == 1 else max(first, last))


def flops_per_token(model: ModelConfig, seq_length: int, lora: LoraConfig | None = None) -> float:
    """FLOPs of one trained token, forward and backward: 6 per weight that multiplies, and causal attention.

    Recomputation is not counted: it is no useful work. Of the experts those count that a token is sent to. Weights beneath
    adapters have no gradient of their own: 4 each, and 6 for each of the adapters'.
    """
    adapted = lora is not None and lora.lora_rank > 0
    more = 6.0 * targets.parameter_count(model, lora) if adapted else 0.0
    tied = model.tie_embeddings  # then the embedding multiplies too, as the output layer
    weights = sum(
        math.prod(shape) * copies
        for row, shape, copies in _table(model, active=True)
        if len(shape) == 2 and (tied or row.megatron_param != EMBEDDING)
    )
    attention = 6.0 * model.num_layers * model.num_attention_heads * model.head_dim * seq_length
    return (4.0 if adapted else 6.0) * weights + more + attention


def model_states(
    model: ModelConfig,
    parallel: ParallelConfig,
    data_parallel: int,
    dtype: Literal["bf16", "fp16", "fp32"],
    *,
    fp32_gradients: bool = False,
    lora: LoraConfig | None = None,
) -> ModelStates:
    """What ZeRO `parallel.zero_stage` keeps on each device, for `data_parallel` replicas.

    `fp32_gradients`: accumulated in fp32 under bf16, which adds 2 bytes per gradient kept.
    The master is a copy of the weights, in fp32 as well; only stage 0 in fp32 has none. `lora`: gradients and optimizer are those
    of the adapters.
    """
    count, stage = parameters_per_device(model, parallel), parallel.zero_stage
    more = targets.parameter_count(model, lora, parallel) if lora else 0
    trained = more or count
    width = 4 if dtype == "fp32" else 2
    gradient = width + (2 if fp32_gradients and dtype == "bf16" else 0)
    adam, master = 8, 0 if dtype == "fp32" and stage == 0 else 4
    shares = [1 / data_parallel if stage >= least else 1 for least in (3, 2, 1)]
    sizes = ((count + more) * width, trained * gradient, trained * (adam + master))
    return ModelStates(*(size * share for size, share in zip(sizes, shares, strict=True)))


def checkpoint_bytes(model: ModelConfig, lora: LoraConfig | None = None) -> int:
    """Size of one training checkpoint on disk: of all weights, or of the adapters alone."""
    return CHECKPOINT_BYTES * (
        targets.parameter_count(model, lora) if lora and lora.lora_rank else parameter_count(model)
    )


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 (and fp16) TFLOP/s of a device by the name that its driver gives; None where it is not surely known."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def _table(model: ModelConfig, active: bool = False) -> Iterator[tuple[ParamMapping, tuple[int, ...], int]]:
    """Every row of the model's family, its full shape, and how often the model has it; `active`: how often a token meets it."""
    experts = model.moe_router_topk if active else model.num_experts or 0
    for row in FAMILIES[model.family].mappings_of(model):
        copies = (model.num_layers if "{l}" in row.megatron_param else 1) * (
            experts if "{e}" in row.megatron_param else 1
        )
        yield row, param_shape(model, row), copies
