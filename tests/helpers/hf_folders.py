"""Hugging Face directories as they are published: weights, token ids, a tokenizer, code that must not run."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from helpers.shapes import hf_shapes
from helpers.tokenizers import folder_with

MODEL = ModelConfig(
    "internlm2",
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    vocab_size=1000,
    max_position_embeddings=32,
    add_qkv_bias=False,
    add_dense_bias=False,
)
AUTO_MAP = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
CODE = "raise SystemExit('this must never run')\n"


def directory(folder: Path, model: bytes | None, config: ModelConfig = MODEL, **files: dict) -> Path:
    """A published directory: weights, code that must not run, and what else is given."""
    folder.mkdir(parents=True)
    tensors = {
        n: torch.zeros(s) for p in param_mapping.parameters(config) for n, s in hf_shapes(config, p).items()
    }
    save_file(tensors, folder / "model.safetensors")
    config_json = FAMILIES[config.family].write_config(config) | {
        "auto_map": AUTO_MAP,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model is not None:
        folder_with(folder, model)
    for name, values in ({"config": config_json} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / "modeling_internlm2.py").write_text(CODE)
    return folder


def export(
    folder: Path,
    target: Path,
    *,
    family: str | None = None,
    copy_code: bool = False,
    tokenizer: Path | None = None,
) -> Path:
    source = convert.with_tokenizer(
        convert.open_reader(folder), None if tokenizer is None else str(tokenizer)
    )
    convert.convert(source, target, convert.HuggingFaceWriter(family, copy_code=copy_code))
    return target


def stored(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())
