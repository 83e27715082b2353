"""The independent reference: a plain torch loop over Hugging Face's model, one process, none of the project's model code."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ascendspeed import weights
from ascendspeed.config import ModelConfig


def hugging_face(model: ModelConfig, tensors: dict[str, Tensor], rope: dict[str, Any] | None = None) -> LlamaForCausalLM:
    """HF Llama with our weights, plain rope unless given: InternLM v1 is Llama with biases on q, k, v and o."""
    config = LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": model.rotary_base},
        attention_bias=model.add_qkv_bias,
        tie_word_embeddings=model.tie_embeddings,
    )
    theirs: dict[str, Tensor] = {}
    for parameter in weights.parameters(model):
        theirs |= weights.part(model, parameter, tensors[parameter.name])
    reference = LlamaForCausalLM(config)
    left = reference.load_state_dict(theirs, strict=False)
    assert not left.unexpected_keys, left
    assert model.add_qkv_bias == model.add_dense_bias
    assert left.missing_keys == (["lm_head.weight"] if model.tie_embeddings else []), left
    return reference


def token_losses(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token, fp32: [b, s]."""
    logits = model(tokens).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def train(
    model: LlamaForCausalLM, batches: list[dict[str, Tensor]], lrs: list[float], optim: dict[str, Any]
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step: AdamW, clipping, no decay on biases and one-dimensional weights."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": optim["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        betas=(optim["adam_beta1"], optim["adam_beta2"]),
        eps=optim["adam_eps"],
    )
    curve = []
    for batch, lr in zip(batches, lrs, strict=True):
        for group in adamw.param_groups:
            group["lr"] = lr
        mask = batch["loss_mask"]
        loss = (token_losses(model, batch["tokens"], batch["labels"]) * mask).sum() / mask.sum()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip_grad"] or float("inf"))
        adamw.step()
        curve.append((float(loss), float(norm)))
    return curve


def batches(vocab: int, steps: int, samples: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Random global batches whose masks differ from sample to sample, so that a mean of means is wrong."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        text = torch.randint(0, vocab, (samples, length + 1), generator=generator)
        counted = torch.randint(1, length + 1, (samples,), generator=generator)
        mask = (torch.arange(length)[None] < counted[:, None]).float()
        made.append({"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(), "loss_mask": mask})
    return made


def as_json(model: ModelConfig) -> dict[str, Any]:
    """For a job file."""
    return asdict(model)
