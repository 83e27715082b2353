"""Estimates of parameters, memory, FLOPs and checkpoint size from the configuration alone. No torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ascendspeed.config.pipeline_stages import pipeline_stage_layers
from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig, padded_vocab_size
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import ParamMapping, param_shape
from ascendspeed.models.lora import targets

EMBEDDING = "embedding.word_embeddings.weight"

CHECKPOINT_BYTES = 12
"""Bytes per parameter on disk: fp32 master, exp_avg, exp_avg_sq, for every engine, layout and compute
type."""

# Dense bf16 TFLOP/s from the vendors' data sheets; the first match counts. Only devices whose name identifies
# the variant: Ascend's names do not (one 910B has 280, another 376), so that there is no MFU for them until a
# peak is measured.
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
    """Bytes per device for model states, which exist during the whole run; activations and buffers are
    extra."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.weights + self.gradients + self.optimizer


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    return sum(math.prod(shape) * copies for _, shape, copies in _parameter_table(model))


def active_parameter_count(model: ModelConfig) -> int:
    """Parameters that one token uses: of the experts, only those it is routed to."""
    return sum(math.prod(shape) * copies for _, shape, copies in _parameter_table(model, active=True))


def parameters_per_device(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Parameters of the largest tensor- and pipeline-parallel rank, including vocabulary padding and
    replicated parameters."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    stages = pipeline_stage_layers(model.num_layers, parallel)
    layer = first = last = 0
    for mapping, shape, copies in _parameter_table(model):
        shape = (padded_vocab_size(model, parallel), *shape[1:]) if mapping.partition == "vocab" else shape
        size = copies * math.prod(shape) // (1 if mapping.partition == "replicated" else tp)
        if "{l}" in mapping.megatron_param:
            layer += size // model.num_layers
        elif mapping.megatron_param == EMBEDDING:
            first += size
            last += size if pp > 1 and model.tie_embeddings else 0  # the output layer's copy
        else:
            last += size
    sizes = [layers * layer for layers in stages]
    sizes[0] += first
    sizes[-1] += last
    return max(sizes)


def flops_per_token(model: ModelConfig, seq_length: int, lora: LoraConfig | None = None) -> float:
    """FLOPs of one training token, forward and backward: 6 per weight of a matrix product, and causal
    attention.

    Recomputation does not count. Of the experts, only those that a token is routed to count. Frozen weights
    have no gradient: with LoRA they count 4 each, and the adapters' weights 6.
    """
    adapted = lora is not None and lora.lora_rank > 0
    adapters = 6.0 * targets.parameter_count(model, lora) if lora is not None and adapted else 0.0
    tied = model.tie_embeddings  # then the embedding is the output layer, a matrix product
    weights = sum(
        math.prod(shape) * copies
        for mapping, shape, copies in _parameter_table(model, active=True)
        if len(shape) == 2 and (tied or mapping.megatron_param != EMBEDDING)
    )
    attention = 6.0 * model.num_layers * model.num_attention_heads * model.head_dim * seq_length
    return (4.0 if adapted else 6.0) * weights + adapters + attention


def model_states(
    model: ModelConfig,
    parallel: ParallelConfig,
    data_parallel: int,
    dtype: Literal["bf16", "fp16", "fp32"],
    *,
    fp32_gradients: bool = False,
    lora: LoraConfig | None = None,
    param_remainders: bool = False,
) -> ModelStates:
    """Model states per device under ZeRO stage `parallel.zero_stage` with `data_parallel` replicas.

    `fp32_gradients`: gradients are accumulated in fp32 under bf16, which adds 2 bytes per gradient. The
    master weights are an fp32 copy, even in an fp32 run except at stage 0. With `lora`, gradients and
    optimizer states belong to the adapters only. `param_remainders`: 2 bytes take the place of a master.
    """
    count, stage = parameters_per_device(model, parallel), parallel.zero_stage
    adapters = targets.parameter_count(model, lora, parallel) if lora else 0
    trained = targets.trained_count(model, lora, parallel) if lora and adapters else count
    width = 4 if dtype == "fp32" else 2
    gradient = width + (2 if fp32_gradients and dtype == "bf16" else 0)
    adam, master = 8, 0 if dtype == "fp32" and stage == 0 else 2 if param_remainders else 4
    shares = [1 / data_parallel if stage >= least else 1 for least in (3, 2, 1)]
    sizes = ((count + adapters) * width, trained * gradient, trained * (adam + master))
    return ModelStates(*(size * share for size, share in zip(sizes, shares, strict=True)))


def checkpoint_bytes(model: ModelConfig, lora: LoraConfig | None = None) -> int:
    """Bytes of one training checkpoint on disk: all weights, or with `lora` the adapters alone."""
    return CHECKPOINT_BYTES * (
        targets.trained_count(model, lora) if lora and lora.lora_rank else parameter_count(model)
    )


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 (and fp16) TFLOP/s of a device by its driver's name for it; None if the variant is not
    certain."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def _parameter_table(
    model: ModelConfig, active: bool = False
) -> Iterator[tuple[ParamMapping, tuple[int, ...], int]]:
    """Yields (mapping, full shape, copies in the model) of every parameter; `active`: copies that one token
    uses."""
    experts = model.moe_router_topk if active else model.num_experts or 0
    for mapping in FAMILIES[model.family].mappings_of(model):
        copies = (model.num_layers if "{l}" in mapping.megatron_param else 1) * (
            experts if "{e}" in mapping.megatron_param else 1
        )
        yield mapping, param_shape(model, mapping), copies
