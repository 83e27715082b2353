"""What the rows are compared with: Hugging Face's model in one process of plain torch, in fp32 and twice in bf16."""

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
from benchmarks.parity import rows

Curve = list[Any]
"""(loss, gradient norm) of every step."""
Named = dict[str, Tensor]
"""Weights by the names of the family's published checkpoints."""


class Trained(NamedTuple):
    """A curve and where it ended."""

    curve: Curve
    weights: Named


@dataclass(frozen=True)
class Reference:
    """Of one family."""

    model: ModelConfig
    start: Named
    end: Trained
    """In fp32, the global batch at once."""
    others: dict[str, Trained]
    """The same mathematics again: in fp32 in another order of summation, and twice in bf16 over fp32 masters."""
    files: dict[str | None, str]
    """The weights of the start as the worker reads them; by a key of `MIXED_UP` also wrong ones."""


FP32 = "fp32, sample by sample"
BF16 = ("bf16, sample by sample, SDPA", "bf16, at once, eager attention")


def reference(family: str, steps: int, mistakes: set[str], folder: Path) -> Reference:
    """Trains, in fp32 and bf16; writes the files, those of `mistakes` too, into `folder`."""
    disable_progress_bar()
    model = rows.MODELS[family]
    _, start = oracle.native(model)
    start = {name: tensor.clone() for name, tensor in start.items()}
    ours = {
        p.name: param_mapping.hf_to_megatron(model, p, start).contiguous()
        for p in param_mapping.parameters(model)
    }
    files: dict[str | None, str] = {}
    for name in (None, *sorted(mistakes)):
        made = ours if name is None else {k: v.contiguous() for k, v in MIXED_UP[name](ours, model).items()}
        files[name] = str(folder / f"{family}-{name or 'right'}.safetensors")
        save_file(made, files[name])
    others = {
        FP32: trained(family, steps, samples=1),
        BF16[0]: trained(family, steps, 1, "sdpa"),
        BF16[1]: trained(family, steps, None, "eager"),
    }
    return Reference(model, start, trained(family, steps), others, files)


def trained(family: str, steps: int, samples: int | None = None, attention: str | None = None) -> Trained:
    """From the start, in fp32, `samples` at a time (None: all); with `attention` in bf16 over fp32 masters."""
    model = rows.MODELS[family]
    run = rows.run_of(model, steps)
    theirs, _ = oracle.native(model)
    theirs.train()
    half = None
    if attention:
        half = oracle.halved(theirs)
        half.set_attn_implementation(attention)
    data = oracle.batches(
        model.vocab_size, steps, run.train.global_batch_size, run.data.seq_length, rows.DATA_SEED
    )
    lrs = [lr_schedule.lr_at(i, run.optim, steps) for i in range(steps)]
    curve = oracle.train(theirs, data, lrs, vars(run.optim), half, samples)
    return Trained(curve, {name: tensor.clone() for name, tensor in oracle.published(theirs, model).items()})


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
PROJECTION, GATE = (
    "decoder.layers.1.self_attention.linear_proj.weight",
    "decoder.layers.2.mlp.linear_fc1.weight",
)
EXPERTS = [f"decoder.layers.1.mlp.experts.local_experts.{i}.linear_fc1.weight" for i in (0, 1)]


def transposed(ours: Named, model: ModelConfig) -> Named:
    """A square matrix, so that no shape tells."""
    return ours | {PROJECTION: ours[PROJECTION].t()}


def heads(ours: Named, model: ModelConfig) -> Named:
    """The first two groups of [queries, key, value], in each other's place."""
    first, second, *others = ours[QKV].chunk(model.kv_heads)
    return ours | {QKV: torch.cat([second, first, *others])}


def gate(ours: Named, model: ModelConfig) -> Named:
    """Up where the gate should be."""
    return ours | {GATE: torch.cat(ours[GATE].chunk(2)[::-1])}


def experts(ours: Named, model: ModelConfig) -> Named:
    """The first matrices of two experts."""
    return ours | dict(zip(EXPERTS, (ours[name] for name in EXPERTS[::-1]), strict=True))


MIXED_UP: dict[str, Callable[[Named, ModelConfig], Named]] = {
    "transposed": transposed,
    "heads": heads,
    "gate": gate,
    "experts": experts,
}
"""Weights with a mistake that no shape betrays."""
