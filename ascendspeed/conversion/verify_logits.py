"""Compares the logits of a checkpoint and its conversion, each in a model of a few layers and a small
vocabulary.

The logits of a checkpoint that transformers has a class for come from that class, fed from the files under
their own names; those of any other from this project's model. A wrong mapping is thus found even if it is
wrong in both directions.
"""

import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, full_slice
from ascendspeed.conversion.formats.huggingface import reading as huggingface
from ascendspeed.models import estimates
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.base import LlamaNames
from ascendspeed.models.param_mapping import parameters
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

MAX_LAYERS = 2
MAX_VOCABULARY = 256
TOKENS = (2, 48)
"""Sequences of the comparison of logits, and their length."""
TOLERANCE = 1e-4
"""Between two implementations in fp32, relative to the largest logit; a wrong mapping is off by about 1."""
LOAD_ERRORS = (ImportError, OSError, ValueError, KeyError)
"""Exceptions of transformers for a model that the installed version cannot load."""


class LogitsUnavailable(Exception):
    """Logits of one checkpoint cannot be computed with the installed libraries; the message is the reason."""


def compare_logits(
    source: CheckpointReader, result: CheckpointReader, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Compares the logits of both checkpoints on fixed tokens, each in a model of a few layers and a small
    vocabulary.

    Returns {"skipped": reason} if memory is short, transformers cannot load the model, or the weights are not
    finite. Raises `UserError` if the logits differ.
    """
    if source.config.reward_head:
        return {"skipped": "a reward model has scores"}
    small = _reduced(source.config)
    needed = 12 * estimates.parameter_count(small)
    free = _available_memory()
    if needed > free:
        return {
            "skipped": f"{needed / 1e9:.1f} GB of memory are needed for {small.num_layers} layers, "
            "{free / 1e9:.1f} GB are free"
        }
    tokens = torch.randint(0, small.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    try:
        source_model, expected = _logits(source, small, tokens, dtype)
        result_model, actual = _logits(result, small, tokens, None)
    except LogitsUnavailable as error:
        return {"skipped": f"no logits: {error}"}
    largest = float(expected.abs().max())
    difference = float((expected - actual).abs().max())
    if not math.isfinite(largest):
        return {"skipped": "the weights hold NaN or infinity"}
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"verification failed: logits of {source_model} ({source.description}) and {result_model} "
            f"({result.description}) "
            f"differ by {difference:.2g}, the largest being {largest:.2g}; nothing was written"
        )
    return {
        "source": source_model,
        "result": result_model,
        "layers": small.num_layers,
        "vocabulary": small.vocab_size,
        "tokens": list(TOKENS),
        "largest": largest,
        "difference": difference,
    }


def _reduced(config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        num_layers=min(config.num_layers, MAX_LAYERS),
        vocab_size=min(config.vocab_size, MAX_VOCABULARY),
    )


def _available_memory() -> int:
    """Bytes of free memory."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _logits(
    reader: CheckpointReader, small: ModelConfig, tokens: Tensor, dtype: torch.dtype | None
) -> tuple[str, Tensor]:
    """Returns the name of the implementation and its fp32 logits [b, s, v], from the weights cast to `dtype`
    first.
    """
    is_hf = reader.description == huggingface.DESCRIPTION
    config_json = _config_of_transformers_class(reader) if is_hf else None
    if config_json:
        logits = _transformers_logits(reader, config_json, small, tokens, dtype)
        return f"transformers' {config_json['model_type']}", logits
    return "our model", _own_logits(reader, small, tokens, dtype)


def _config_of_transformers_class(reader: CheckpointReader) -> dict[str, Any] | None:
    """The config.json for the class in transformers that can hold the tensors of a directory; None: there is
    no such class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = REFERENCE.name if FAMILIES[reader.config.family].llama_names else reader.config.family
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    if family == reader.config.family:
        return reader.config_json
    return FAMILIES[family].write_config(replace(reader.config, family=family, normalize_head=False))


# ---------------------------------------------------------------- this project's model


def _own_logits(
    reader: CheckpointReader, small: ModelConfig, tokens: Tensor, dtype: torch.dtype | None
) -> Tensor:
    from ascendspeed.distributed import device

    cpu = device.prepare("cpu")  # before Megatron is imported
    from ascendspeed.distributed import process_groups
    from ascendspeed.models.gpt import gpt_model, layer_spec

    single = ParallelConfig()
    config = replace(small, family=reader.config.family)
    with process_groups.initialized(cpu, single, seed=1), torch.no_grad():
        transformer_config = layer_spec.transformer_config(config, single, TrainConfig())
        model = gpt_model.build_model(config, single, transformer_config).eval()
        full = ((p, reader.read_block(p.name, full_slice(p)).reshape(p.shape)) for p in parameters(config))
        cast = ((p.name, tensor.to(dtype or tensor.dtype)) for p, tensor in full)
        gpt_model.load_weights(model, config, single, cast)
        return model(tokens, None, None)[..., : config.vocab_size].float()


# ---------------------------------------------------------------- transformers


def _transformers_logits(
    reader: CheckpointReader,
    config_json: dict[str, Any],
    small: ModelConfig,
    tokens: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """Logits of transformers' class for a directory with the first layers and vocabulary rows of the
    checkpoint.
    """
    from safetensors.torch import save_file

    tensors = _reduced_tensors(reader, small, dtype)
    layers = reader.config.num_layers
    config_json = {  # lists of one entry per layer are cut, too
        key: value[: small.num_layers] if isinstance(value, list) and len(value) == layers else value
        for key, value in config_json.items()
        if key != "auto_map"
    }
    config_json |= {
        "num_hidden_layers": small.num_layers,
        "vocab_size": small.vocab_size,
        "pad_token_id": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(config_json))
        model = _load_with_transformers(folder)
    with torch.no_grad():
        return model.eval()(tokens).logits


def _load_with_transformers(folder: str) -> torch.nn.Module:
    """Loads a directory in fp32. Raises `LogitsUnavailable` if the installed transformers cannot load the
    model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the comparison of bytes has one
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except LOAD_ERRORS as error:
        raise LogitsUnavailable(f"{type(error).__name__}: {first_line(error)}") from error


def _reduced_tensors(
    reader: CheckpointReader, small: ModelConfig, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Tensors of the first layers and vocabulary rows, under the names of the class in transformers."""
    vocabulary_names = {
        name
        for row in FAMILIES[reader.config.family].param_mappings
        if row.partition == "vocab"
        for name in row.hf_params
    }
    reduced: dict[str, Tensor] = {}
    for name, tensor in huggingface.read_tensors(reader.path).items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= small.num_layers:
            continue
        cast = tensor.to(dtype or tensor.dtype)
        if name in vocabulary_names:
            cast = cast[: small.vocab_size]
        reduced |= as_llama(reader.config, name, cast)
    return {name: tensor.contiguous() for name, tensor in reduced.items()}


def as_llama(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Renames a tensor, and splits a fused qkv, as transformers' Llama has them; other families keep their
    names.
    """
    names = FAMILIES[config.family].llama_names or LlamaNames()
    for own, llama in names.renames:
        name = name.replace(own, llama)
    if names.fused_qkv and f"{names.fused_qkv}." in name:
        kinds = (f"self_attn.{kind}_proj" for kind in "qkv")
        matrices = _separate_qkv(config, names, tensor)
        return {
            name.replace(names.fused_qkv, kind): matrix for kind, matrix in zip(kinds, matrices, strict=True)
        }
    if config.normalize_head and name == "lm_head.weight":
        return {name: torch.nn.functional.normalize(tensor.float()).to(tensor.dtype)}
    return {name: tensor}


def _separate_qkv(config: ModelConfig, names: LlamaNames, fused: Tensor) -> list[Tensor]:
    """q, k and v [rows, ...] of one matrix or bias that holds all three."""
    if names.qkv_order == "grouped":  # [groups][q ..., k, v][d]
        heads = fused.unflatten(0, (config.kv_heads, -1, config.head_dim))
        return [part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.kv_heads * config.head_dim
    return list(fused.split([q_rows, kv_rows, kv_rows]))
