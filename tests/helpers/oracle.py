"""Independent reference: a plain torch loop over Hugging Face's model in one process."""

import copy
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES


def hugging_face(
    model: ModelConfig, tensors: dict[str, Tensor], rope: dict[str, Any] | None = None
) -> LlamaForCausalLM:
    """HF Llama with our weights, default rope unless given: InternLM v1 is Llama with attention biases."""
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
    renamed: dict[str, Tensor] = {}
    for parameter in param_mapping.parameters(model):
        renamed |= param_mapping.megatron_to_hf(model, parameter, tensors[parameter.name])
    reference = LlamaForCausalLM(config)
    left = reference.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys, left
    assert model.add_qkv_bias == model.add_dense_bias
    assert left.missing_keys == (["lm_head.weight"] if model.tie_embeddings else []), left
    return reference


def native(model: ModelConfig, seed: int = 5) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A Hugging Face model with random weights, biases and norms, and its tensors under the family's names.

    A family that transformers knows is built from our config.json, and named by its `save_pretrained`.
    The others, and biases that transformers cannot separate, are a Llama: the mapping is written out here,
    independently of the family's own.
    """
    reference = AutoModelForCausalLM.from_config(config_of(model), attn_implementation="sdpa").eval()
    randomize(reference, model, seed)
    return reference, published(reference, model)


def published(reference: PreTrainedModel, model: ModelConfig) -> dict[str, Tensor]:
    """Weights of a `native` model under the family's names. Call once for baichuan: it is changed."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        named = load_file(Path(folder) / "model.safetensors")
    return RENAMED.get(model.family, lambda named, model, reference: without_zeros(named))(
        named, model, reference
    )


def config_of(model: ModelConfig) -> PreTrainedConfig:
    """Configuration from which transformers builds the model."""
    known = model.family not in RENAMED and (
        not model.add_mlp_bias or model.add_qkv_bias == model.add_dense_bias
    )
    config = AutoConfig.for_model(**FAMILIES[model.family].write_config(model)) if known else as_llama(model)
    config.pad_token_id = None  # its embedding would get no gradient
    return config


def as_llama(model: ModelConfig) -> LlamaConfig:
    """`LlamaConfig` of a model of a dense family."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rope_scaling_type != "none":
        rope |= {"rope_type": model.rope_scaling_type, "factor": model.rope_scaling_factor}
    return LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope,
        attention_bias=model.add_qkv_bias or model.add_dense_bias,
        mlp_bias=model.add_mlp_bias,
        tie_word_embeddings=model.tie_embeddings,
    )


@torch.no_grad()
def randomize(reference: PreTrainedModel, model: ModelConfig, seed: int) -> None:
    """Matrices normal(0, std), and such noise added to biases and norms. Biases the model lacks are 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * model.init_method_std)
        elif (
            "self_attn" in name
            and name.endswith(".bias")
            and not (model.add_dense_bias if "o_proj" in name else model.add_qkv_bias)
        ):
            parameter.zero_()
        else:
            parameter.add_(0.1 * noise)


def without_zeros(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases that the model lacks."""
    return {name: tensor for name, tensor in named.items() if tensor.any()}


def internlm(named: dict[str, Tensor], model: ModelConfig, reference: PreTrainedModel) -> dict[str, Tensor]:
    """InternLM's first names are Llama's."""
    return without_zeros(named)


def internlm2(named: dict[str, Tensor], model: ModelConfig, reference: PreTrainedModel) -> dict[str, Tensor]:
    """InternLM2 names; wqkv holds, per key/value head, the query heads that it serves, then k, then v."""
    words = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    renamed = {}
    for name, tensor in without_zeros(named).items():
        if "q_proj" in name:
            q, k, v = (named[name.replace("q_proj", f"{x}_proj")].split(model.head_dim) for x in "qkv")
            heads = [
                head
                for i in range(len(k))
                for head in (*q[i * len(q) // len(k) : (i + 1) * len(q) // len(k)], k[i], v[i])
            ]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(heads)
        elif not re.search("[kv]_proj", name):
            old = next((old for old in words if old in name), "")
            renamed[name.replace(old, words[old]) if old else name] = tensor
    return renamed


class RowsOfLength1(torch.nn.Module):
    """A matrix -> the same with every row divided by its length."""

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix / matrix.pow(2).sum(1, keepdim=True).sqrt()


def baichuan(named: dict[str, Tensor], model: ModelConfig, reference: PreTrainedModel) -> dict[str, Tensor]:
    """W_pack is q, then k, then v; the head's rows have any length in the file and length 1 in use."""
    renamed = {name: tensor for name, tensor in named.items() if not re.search("[qkv]_proj", name)}
    for layer in range(model.num_layers):
        where = f"model.layers.{layer}.self_attn."
        renamed[where + "W_pack.weight"] = torch.cat([named[f"{where}{x}_proj.weight"] for x in "qkv"])
    register_parametrization(reference.lm_head, "weight", RowsOfLength1())
    return renamed


RENAMED = {"internlm": internlm, "internlm2": internlm2, "baichuan": baichuan}


def token_losses(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token, fp32: [b, s]."""
    logits = model(tokens).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view_as(labels)


def products_in_fp32() -> AbstractContextManager:
    """Meanwhile Muon computes in fp32: rounding to bf16 makes much of the last bit of a gradient."""
    return patch.object(Tensor, "bfloat16", Tensor.clone)


def train(
    model: LlamaForCausalLM,
    batches: list[dict[str, Tensor]],
    lrs: list[float],
    optim: dict[str, Any],
    half: LlamaForCausalLM | None = None,
    samples: int | None = None,
    muon: bool = False,
    auxiliary: Callable[[LlamaForCausalLM, dict[str, Tensor]], tuple[Tensor, list[float]]] | None = None,
) -> list[tuple[float, ...]]:
    """(loss, gradient norm) of every step: AdamW, clipping, no decay on biases and one-dimensional weights.

    `muon`: torch's Muon for the matrices of the layers.
    `auxiliary`: a further loss of a batch to differentiate, and numbers that follow the norm.
    `half`: a copy in another type that computes forward and backward on `samples` at a time (None: all);
    `model` holds the masters and sums the gradients.
    """
    worker = model if half is None else half
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
        decay = [p for p in decay if all(p is not other for other in matrices)]
        optimizers.append(
            torch.optim.Muon(
                matrices,
                weight_decay=optim["weight_decay"],
                momentum=optim["muon_momentum"],
                ns_steps=optim["muon_num_ns_steps"],
                adjust_lr_fn=optim["muon_scale_mode"],
            )
        )
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": optim["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        betas=(optim["adam_beta1"], optim["adam_beta2"]),
        eps=optim["adam_eps"],
    )
    optimizers.append(adamw)
    curve = []
    for batch, lr in zip(batches, lrs, strict=True):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        model.zero_grad()
        total, size = 0.0, samples or len(batch["tokens"])
        for i in range(0, len(batch["tokens"]), size):
            part = {name: tensor[i : i + size] for name, tensor in batch.items()}
            loss = (token_losses(worker, part["tokens"], part["labels"]) * part["loss_mask"]).sum() / batch[
                "loss_mask"
            ].sum()
            loss.backward()
            total += float(loss.detach())
            if half is not None:
                hand_over(half, model)
        further: list[float] = []
        if auxiliary:
            extra, further = auxiliary(model, batch)
            extra.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip_grad"] or float("inf"))
        with products_in_fp32() if muon else nullcontext():
            for optimizer in optimizers:
                optimizer.step()
        if half is not None:
            publish(model, half)
        curve.append((total, float(norm), *further))
    return curve


def halved(model: LlamaForCausalLM, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """A copy with parameters of another type; buffers (frequencies of the rotary embedding) keep theirs."""
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(dtype)
    return half


@torch.no_grad()
def hand_over(half: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    """Adds the gradients of `half` to those of `model`, and clears them."""
    for copy_parameter, ours in zip(half.parameters(), model.parameters(), strict=True):
        gradient = copy_parameter.grad.to(ours.dtype)
        ours.grad, copy_parameter.grad = gradient if ours.grad is None else ours.grad + gradient, None


@torch.no_grad()
def publish(model: LlamaForCausalLM, half: LlamaForCausalLM) -> None:
    """The masters' values, rounded."""
    for ours, copy_parameter in zip(model.parameters(), half.parameters(), strict=True):
        copy_parameter.copy_(ours)


def batches(vocab: int, steps: int, samples: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Random global batches whose masks differ from sample to sample, so that a mean of means is wrong."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(steps):
        text = torch.randint(0, vocab, (samples, length + 1), generator=generator)
        counted = torch.randint(1, length + 1, (samples,), generator=generator)
        mask = (torch.arange(length)[None] < counted[:, None]).float()
        result.append(
            {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(), "loss_mask": mask}
        )
    return result


def as_json(model: ModelConfig) -> dict[str, Any]:
    """For a job file."""
    return asdict(model)
