"""Packed batches on disk, cases of them for the engines, and their documents one by one in plain torch."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from ascendspeed.config import lr_schedule
from ascendspeed.config.schema import ModelConfig, ParallelConfig
from ascendspeed.models import param_mapping
from helpers import oracle
from helpers.engines import RUN as BASE
from helpers.engines import Curve, micro_batches_of
from helpers.layouts import VPP
from helpers.moe import loaded
from helpers.packed_attention import INTERNLM

LENGTH, STEPS, FEW_STEPS = 48, 20, 3
DEEP = replace(INTERNLM, num_layers=4)
"""For interleaved stages of one layer."""
RUN = replace(
    BASE,
    model=INTERNLM,
    parallel=ParallelConfig(),
    data=replace(BASE.data, seq_length=LENGTH),
    train=replace(BASE.train, micro_batch_size=2),
)
ZERO = {stage: {"deepspeed": True, "zero_stage": stage} for stage in range(4)}

Batches = dict[str, torch.Tensor]
"""tokens, labels, loss_mask, position_ids: each [steps, samples, s]."""
Rows = list[list[list[int]]]
"""step -> row -> lengths of its documents."""


def packed(steps: int = STEPS, samples: int = 4, seed: int = 11) -> tuple[Batches, Rows]:
    """Rows of documents of 1 to 48 tokens whose prompts are not supervised; the end of a row is padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    tokens = torch.randint(0, INTERNLM.vocab_size, (steps, samples, LENGTH), generator=generator)
    labels, mask, positions = (
        tokens.roll(-1, -1),
        torch.ones(steps, samples, LENGTH),
        torch.zeros_like(tokens),
    )
    rows: Rows = []
    for i in range(steps):
        rows.append([])
        for j in range(samples):
            lengths = [LENGTH] if draw(0, 8) == 0 else [1]
            while sum(lengths) < LENGTH:
                lengths.append(min(draw(1, 33), LENGTH - sum(lengths)))
            ends = torch.tensor(lengths).cumsum(0)
            positions[i, j] = torch.cat([torch.arange(n) for n in lengths])
            mask[i, j, ends - 1] = 0  # what comes next is another document's
            for end, n in zip(ends.tolist(), lengths, strict=True):
                mask[i, j, end - n : end - n + draw(0, n)] = 0  # the prompt
            if len(lengths) > 2:
                mask[i, j, -lengths[-1] :] = 0
            rows[-1].append(lengths)
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}, rows


class OneByOne(torch.nn.Module):
    """Hugging Face's model over packed batches in their order: every document goes through it alone."""

    def __init__(self, model: Any, rows: Rows) -> None:
        super().__init__()
        self.model, self.rows = model, iter(rows)

    def forward(self, tokens: torch.Tensor) -> Any:
        return SimpleNamespace(
            logits=torch.stack(
                [
                    torch.cat([self.alone(x) for x in row.split(n)])
                    for row, n in zip(tokens, next(self.rows), strict=True)
                ]
            )
        )

    def alone(self, document: torch.Tensor) -> torch.Tensor:
        self.model.model.rotary_emb.max_seq_len_cached = (
            0  # or the base of a longer document before would stay
        )
        return self.model(document[None]).logits[0]


def theirs(model: ModelConfig, folder: Path) -> Any:
    """Hugging Face's model with the weights that a run begins with."""
    tensors = dict(param_mapping.random_tensors(model, RUN.train.seed))
    if model.num_experts:
        return loaded(model, tensors, folder)
    assert model.rope_scaling_type == "dynamic"
    rope = {"rope_type": "dynamic", "rope_theta": model.rotary_base, "factor": model.rope_scaling_factor}
    return oracle.hugging_face(model, tensors, rope)


def trained(
    model: ModelConfig, batches: Batches, rows: Rows, steps: int, folder: Path
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Plain torch, one document at a time: the curve, and Adam's first moments after step 1 by our names."""
    data = [{name: column[i] for name, column in batches.items()} for i in range(steps)]
    lrs = [lr_schedule.lr_at(i, RUN.optim, STEPS) for i in range(steps)]
    model = model if model.num_experts else replace(model, family="llama")
    reference = theirs(model, folder / "first")
    oracle.train(OneByOne(reference, rows), data[:1], lrs[:1], vars(RUN.optim))
    gradients = {
        name: (1 - RUN.optim.adam_beta1) * parameter.grad for name, parameter in reference.named_parameters()
    }
    moments = (
        {}
        if model.num_experts
        else {
            p.name: param_mapping.hf_to_megatron(model, p, gradients) for p in param_mapping.parameters(model)
        }
    )
    return oracle.train(OneByOne(theirs(model, folder / "all"), rows), data, lrs, vars(RUN.optim)), moments


def case(
    parallel: dict[str, Any], data: Path, last: int, model: ModelConfig | None = None, **more: Any
) -> dict[str, Any]:
    changes = {
        "parallel": parallel,
        "model": asdict(model or (DEEP if VPP.keys() <= parallel.keys() else INTERNLM)),
        "train": (micro_batches_of(parallel) if last < STEPS else {}) | more.pop("train", {}),
        "optim": more.pop("optim", {}),
    }
    return {"changes": changes, "data": str(data), "last": last, **more}


def written(batches: Batches, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in batches.items()}, path)
    return path
