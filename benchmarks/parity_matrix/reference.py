"""Reference of the parity matrix: Hugging Face's model in one process of plain torch, in fp32 and twice in
bf16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import oracle
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from ascendspeed.config import lr_schedule
from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import param_mapping
from benchmarks.parity_matrix import layouts

MetricCurve = list[Any]
"""(loss, gradient norm) of every step."""
NamedTensors = dict[str, Tensor]
"""Weights by the names of the family's published checkpoints."""


class TrainedModel(NamedTuple):
    """Metrics of every step and the final weights."""

    curve: MetricCurve
    weights: NamedTensors


@dataclass(frozen=True)
class Reference:
    """References of one family."""

    model: ModelConfig
    start: NamedTensors
    end: TrainedModel
    """Trained in fp32 on the whole global batch at once."""
    others: dict[str, TrainedModel]
    """Further references: in fp32 with another order of summation, and twice in bf16 over fp32 master
    weights.
    """
    files: dict[str | None, str]
    """Initial weights in the worker's format; also wrong ones, by key of `WEIGHT_MISTAKES`."""


FP32 = "fp32, sample by sample"
BF16 = ("bf16, sample by sample, SDPA", "bf16, at once, eager attention")


def build_reference(family: str, steps: int, mistakes: set[str], folder: Path) -> Reference:
    """Trains the references and writes the initial weights, with and without `mistakes`, into `folder`."""
    disable_progress_bar()
    model = layouts.MODELS[family]
    _, start = oracle.native(model)
    start = {name: tensor.clone() for name, tensor in start.items()}
    ours = {
        p.name: param_mapping.hf_to_megatron(model, p, start).contiguous()
        for p in param_mapping.parameters(model)
    }
    files: dict[str | None, str] = {}
    for name in (None, *sorted(mistakes)):
        made = (
            ours
            if name is None
            else {k: v.contiguous() for k, v in WEIGHT_MISTAKES[name](ours, model).items()}
        )
        files[name] = str(folder / f"{family}-{name or 'right'}.safetensors")
        save_file(made, files[name])
    others = {
        FP32: train_model(family, steps, samples=1),
        BF16[0]: train_model(family, steps, 1, "sdpa"),
        BF16[1]: train_model(family, steps, None, "eager"),
    }
    return Reference(model, start, train_model(family, steps), others, files)


def train_model(
    family: str, steps: int, samples: int | None = None, attention: str | None = None
) -> TrainedModel:
    """Trains in fp32, `samples` at a time (None: all); with `attention`, in bf16 over fp32 master weights."""
    model = layouts.MODELS[family]
    run = layouts.base_run(model, steps)
    hf_model, _ = oracle.native(model)
    hf_model.train()
    half = None
    if attention:
        half = oracle.halved(hf_model)
        half.set_attn_implementation(attention)
    data = oracle.batches(
        model.vocab_size, steps, run.train.global_batch_size, run.data.seq_length, layouts.DATA_SEED
    )
    lrs = [lr_schedule.lr_at(i, run.optim, steps) for i in range(steps)]
    curve = oracle.train(hf_model, data, lrs, vars(run.optim), half, samples)
    weights = {name: tensor.clone() for name, tensor in oracle.published(hf_model, model).items()}
    return TrainedModel(curve, weights)


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
PROJECTION, GATE = (
    "decoder.layers.1.self_attention.linear_proj.weight",
    "decoder.layers.2.mlp.linear_fc1.weight",
)
EXPERTS = [f"decoder.layers.1.mlp.experts.local_experts.{i}.linear_fc1.weight" for i in (0, 1)]


def transposed(ours: NamedTensors, model: ModelConfig) -> NamedTensors:
    """Transposes a square matrix, which no shape check detects."""
    return ours | {PROJECTION: ours[PROJECTION].t()}


def heads(ours: NamedTensors, model: ModelConfig) -> NamedTensors:
    """Swaps the first two groups of [queries, key, value]."""
    first, second, *others = ours[QKV].chunk(model.kv_heads)
    return ours | {QKV: torch.cat([second, first, *others])}


def gate(ours: NamedTensors, model: ModelConfig) -> NamedTensors:
    """Swaps the gate and the up projection."""
    return ours | {GATE: torch.cat(ours[GATE].chunk(2)[::-1])}


def experts(ours: NamedTensors, model: ModelConfig) -> NamedTensors:
    """Swaps the first matrices of two experts."""
    return ours | dict(zip(EXPERTS, (ours[name] for name in EXPERTS[::-1]), strict=True))


WEIGHT_MISTAKES: dict[str, Callable[[NamedTensors, ModelConfig], NamedTensors]] = {
    "transposed": transposed,
    "heads": heads,
    "gate": gate,
    "experts": experts,
}
"""Mistakes in weights that no shape check detects."""
