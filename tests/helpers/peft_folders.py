"""Tiny base models, and adapter directories that peft itself writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families import FAMILIES
from helpers import oracle

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=125,
    max_position_embeddings=64,
)
NO_BIAS = {"add_qkv_bias": False, "add_dense_bias": False}
MODELS = {
    "internlm": SMALL,
    "internlm2": replace(SMALL, family="internlm2", num_query_groups=2, **NO_BIAS),
    "llama": replace(SMALL, family="llama", num_query_groups=2, **NO_BIAS),
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    reference, named = oracle.native(MODELS[family])
    return reference.to(dtype), {name: tensor.to(dtype) for name, tensor in named.items()}


def base_folder(family: str, folder: Path) -> Path:
    """A Hugging Face directory."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model_of(family)[1].items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(FAMILIES[family].write_config(MODELS[family])))
    return folder


def save_adapter(
    reference: Any, folder: Path, save_embedding_layers: bool | str = "auto", **settings: Any
) -> Path:
    """A directory that peft saves, every trained tensor of which differs from its initial value."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings)
    adapted = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder
