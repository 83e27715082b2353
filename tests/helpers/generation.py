"""Hugging Face's generation beside the project's."""

from typing import Any

import torch

from ascendspeed.config.schema import ModelConfig, ParallelConfig
from helpers.models import ours


def language_model(cpu, model: ModelConfig, tensors):
    from ascendspeed.distributed import process_groups
    from ascendspeed.inference.engine import LanguageModel

    return LanguageModel(
        ours(cpu, model, tensors), model, process_groups.initialize(cpu, ParallelConfig(), 1), cpu
    )


def texts(found) -> list[list[list[int]]]:
    return [[one.tokens for one in each] for each in found]


def theirs(reference, prompt: list[int], **params: Any) -> list[list[int]]:
    """What Hugging Face's `generate` adds to one prompt; pad is eos."""
    stops = list(params.pop("stop_ids", ())) or None
    more = {"pad_token_id": stops[0] if stops else 0, "eos_token_id": stops, "do_sample": False}
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            **more,
            **params,
        )
    ends = [
        next((i for i, token in enumerate(row) if token in (stops or ())), len(row))
        for row in out[:, len(prompt) :].tolist()
    ]
    return [row[:end] for row, end in zip(out[:, len(prompt) :].tolist(), ends, strict=True)]


def logs_of(reference, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
