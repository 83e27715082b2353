"""Proves that two checkpoints are one model: every byte through the rows, and logits of both ends at a shrunken depth.

The logits of an end that transformers has a class for come from that class, fed from the files by their own names; those of any
other from our model. So a wrong row is seen even where it is wrong both ways round.
"""

import hashlib
import json
import math
import platform
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.conversion import write
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats import huggingface
from ascendspeed.models import estimates
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.base import LlamaNames
from ascendspeed.models.param_mapping import Parameter, Slice2D, parameters
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import Advance, of_bytes, progress

LAYERS, VOCABULARY, TOKENS = 2, 256, (2, 48)
"""Of the shrunken model: at most so many layers and rows of vocabulary; sequences and their length."""
VERSIONS = ("ascendspeed", "torch", "safetensors", "transformers")
TOLERANCE = 1e-4
"""Between two implementations in fp32, of the largest logit; a wrong row is off by about 1."""


def verify(
    source: CheckpointReader, result: CheckpointReader, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """What was proven, for conversion.json. Raises `UserError` naming what is not the same (cast to `dtype`)."""
    hashes, logits = compare(source, result, dtype), compare_logits(source, result, dtype)
    said = f"logits not compared: {logits['skipped']}" if "skipped" in logits else "logits equal"
    return {
        "verdict": f"exact: every byte of {len(hashes)} parameters"
        + (f", cast to {dtype}" if dtype else "")
        + f"; {said}",
        "from": {"kind": source.kind, "folder": str(source.where), "family": source.config.family},
        "to": {"kind": result.kind, "family": result.config.family, "files": _sizes(result.where)},
        "logits": logits,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
        "sha256": hashes,
    }


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("[!.]*"))
        if path.is_file()
    }


def compare(
    source: CheckpointReader, result: CheckpointReader, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """SHA-256 of every full parameter (our name; row-major, little-endian, without padding), the same on both sides.

    Raises `UserError` naming the first that is not.
    """
    if replace(result.config, family=source.config.family) != source.config:
        raise UserError(f"verification failed: the result is {result.config}, the source {source.config}")
    known = list(parameters(source.config))
    with (
        progress(of_bytes("verifying"), source.size(dtype)) as advance,
        ThreadPoolExecutor(write.workers()) as pool,
    ):
        return dict(pool.map(lambda parameter: _same(source, result, parameter, dtype, advance), known))


def _same(
    source: CheckpointReader,
    result: CheckpointReader,
    parameter: Parameter,
    dtype: torch.dtype | None,
    advance: Advance,
) -> tuple[str, str]:
    name, sums = parameter.name, (hashlib.sha256(), hashlib.sha256())
    for piece in write.pieces(_whole(parameter), source.dtypes[name]):
        a, b = source.block(name, piece), result.block(name, piece)
        for digest, block in zip(sums, (a.to(dtype or a.dtype), b), strict=True):
            digest.update(memoryview(block.contiguous().flatten().view(torch.uint8).numpy()))
        advance(b.nbytes)
    if result.dtypes[name] != (dtype or source.dtypes[name]) or sums[0].digest() != sums[1].digest():
        raise UserError(f"verification failed: {name} is not what {source.where} holds; nothing was written")
    return name, sums[0].hexdigest()


def _whole(parameter: Parameter) -> Slice2D:
    return Slice2D(0, 0, 0, 0, parameter.shape[0], math.prod(parameter.shape[1:]))


def compare_logits(
    source: CheckpointReader, result: CheckpointReader, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Logits of both ends on fixed tokens, each in a model of a few layers and a small vocabulary.

    Raises `UserError` when they differ; says why where there was not enough memory, or nothing to compare.
    """
    small = _shrunken(source.config)
    needed, free = 12 * estimates.parameter_count(small), _available()
    if needed > free:
        return {
            "skipped": f"{needed / 1e9:.1f} GB of memory are needed for {small.num_layers} layers, {free / 1e9:.1f} GB are free"
        }
    tokens = torch.randint(0, small.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    try:
        (one, a), (other, b) = (
            _logits(end, small, tokens, kind) for end, kind in ((source, dtype), (result, None))
        )
    except Exception as error:  # whatever transformers says of a model that it should know: the bytes have been proven by now
        return {
            "skipped": f"no logits: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        }
    largest, difference = float(a.abs().max()), float((a - b).abs().max())
    if not math.isfinite(largest):
        return {"skipped": "the weights hold NaN or infinity"}
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"verification failed: logits of {one} ({source.kind}) and {other} ({result.kind}) differ by {difference:.2g}, "
            f"the largest being {largest:.2g}; nothing was written"
        )
    return {
        "source": one,
        "result": other,
        "layers": small.num_layers,
        "vocabulary": small.vocab_size,
        "tokens": list(TOKENS),
        "largest": largest,
        "difference": difference,
    }


def _shrunken(config: ModelConfig) -> ModelConfig:
    return replace(
        config, num_layers=min(config.num_layers, LAYERS), vocab_size=min(config.vocab_size, VOCABULARY)
    )


def _available() -> int:
    """Bytes of memory that can be taken."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _logits(
    end: CheckpointReader, small: ModelConfig, tokens: Tensor, dtype: torch.dtype | None
) -> tuple[str, Tensor]:
    """Whose model it was, and its logits in fp32 [b, s, v], from the weights cast to `dtype` first."""
    theirs = _native_config(end) if end.kind == huggingface.KIND else None
    if theirs:
        return f"transformers' {theirs['model_type']}", _their_logits(end, theirs, small, tokens, dtype)
    return "our model", _our_logits(end, small, tokens, dtype)


def _native_config(end: CheckpointReader) -> dict[str, Any] | None:
    """The config.json of a directory whose tensors have the names of a class in transformers; None: they have not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = REFERENCE.name if FAMILIES[end.config.family].llama_names else end.config.family
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    if family == end.config.family:
        return end.theirs
    return FAMILIES[family].write_config(replace(end.config, family=family, normalize_head=False))


def as_llama(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Renames a tensor, and splits a fused qkv, as transformers' Llama has them; other families keep their names."""
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
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
    return list(fused.split([q_rows, kv_rows, kv_rows]))


def _our_logits(
    end: CheckpointReader, small: ModelConfig, tokens: Tensor, dtype: torch.dtype | None
) -> Tensor:
    from ascendspeed.distributed import device

    here = device.prepare("cpu")  # before Megatron is imported
    from ascendspeed.distributed import process_groups
    from ascendspeed.models.gpt import gpt_model, layer_spec

    alone, config = ParallelConfig(), replace(small, family=end.config.family)
    with process_groups.initialized(here, alone, seed=1), torch.no_grad():
        model = gpt_model.build_model(
            config, alone, layer_spec.transformer_config(config, alone, TrainConfig())
        ).eval()
        full = ((p, end.block(p.name, _whole(p)).reshape(p.shape)) for p in parameters(config))
        gpt_model.load_weights(
            model, config, alone, ((p.name, tensor.to(dtype or tensor.dtype)) for p, tensor in full)
        )
        return model(tokens, None, None)[..., : config.vocab_size].float()


def _their_logits(
    end: CheckpointReader,
    theirs: dict[str, Any],
    small: ModelConfig,
    tokens: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """By transformers, from a directory with the first layers and rows of the one at this end, under its own names."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    kept: dict[str, Tensor] = {}
    vocabulary = {
        name
        for row in FAMILIES[end.config.family].param_mappings
        if row.partition == "vocab"
        for name in row.hf_params
    }
    for name, tensor in huggingface.tensors_in(end.where).items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < small.num_layers:
            kept |= as_llama(
                end.config,
                name,
                tensor.to(dtype or tensor.dtype)[: small.vocab_size if name in vocabulary else None],
            )
    layers = end.config.num_layers
    theirs = {
        k: v[: small.num_layers] if isinstance(v, list) and len(v) == layers else v for k, v in theirs.items()
    }
    theirs |= {"num_hidden_layers": small.num_layers, "vocab_size": small.vocab_size, "pad_token_id": None}
    theirs.pop("auto_map", None)
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in kept.items()},
            Path(folder) / "model.safetensors",
            {"format": "pt"},
        )
        (Path(folder) / "config.json").write_text(json.dumps(theirs))
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    with torch.no_grad():
        return model.eval()(tokens).logits
