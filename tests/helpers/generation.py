"""Generation by the project and by Hugging Face, for comparison."""

from typing import Any

import torch

from ascendspeed.config.schema import ModelConfig, ParallelConfig
from helpers.models import ours


def language_model(cpu, model: ModelConfig, tensors, quantize=None, kv_cache_dtype="auto", dtype="fp32"):
    from ascendspeed.distributed import process_groups
    from ascendspeed.inference.engine import LanguageModel

    return LanguageModel(
        ours(cpu, model, tensors, dtype, quantize=quantize),
        model,
        process_groups.initialize(cpu, ParallelConfig(), 1),
        cpu,
        kv_cache_dtype,
    )


def token_lists(completions) -> list[list[list[int]]]:
    return [[completion.tokens for completion in group] for group in completions]


def hf_generate(reference, prompt: list[int], **params: Any) -> list[list[int]]:
    """New tokens of Hugging Face's `generate` for one prompt; the padding token is eos."""
    stops = list(params.pop("stop_ids", ())) or None
    settings = {"pad_token_id": stops[0] if stops else 0, "eos_token_id": stops, "do_sample": False}
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            **settings,
            **params,
        )
    ends = [
        next((i for i, token in enumerate(row) if token in (stops or ())), len(row))
        for row in out[:, len(prompt) :].tolist()
    ]
    return [row[:end] for row, end in zip(out[:, len(prompt) :].tolist(), ends, strict=True)]


def hf_logprobs(reference, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
