"""Tiny models and folders for tests of conversion, and the converter as a command."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file

from ascendspeed.checkpoint.fragment import Fragment, TrainState
from ascendspeed.checkpoint.save import save_checkpoint
from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, PRESETS
from helpers.shapes import hf_shapes

ROOT = Path(__file__).resolve().parents[2]


BASE = ModelConfig(
    "internlm",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    vocab_size=131,
    max_position_embeddings=32,
)


NO_BIAS = {"add_qkv_bias": False, "add_dense_bias": False}


def small(config: ModelConfig) -> ModelConfig:
    """A model of the same kind that can be split over 8 ranks and 4 stages, as small as possible."""
    experts = {"num_experts": 4} if config.num_experts else {}
    experts |= {"moe_ffn_hidden_size": 16} if config.moe_ffn_hidden_size else {}
    shared = {"moe_shared_expert_intermediate_size": 32} if config.moe_shared_expert_intermediate_size else {}
    sizes = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "vocab_size": 131,
    }
    groups = 2 if config.num_query_groups else None
    return replace(
        config,
        **sizes | experts | shared,
        num_query_groups=groups,
        kv_channels=16 if config.kv_channels else None,
    )


MODELS = {
    **{
        name.removesuffix("-tiny"): small(config)
        for name, config in PRESETS.items()
        if name.endswith("-tiny")
    },
    "internlm": BASE,
    "internlm without bias": replace(BASE, **NO_BIAS),
    "llama, 2 groups": replace(
        BASE, family="llama", num_query_groups=2, kv_channels=16, rotary_base=5e5, **NO_BIAS
    ),
}


LAYOUTS = [(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4)]


def tensors_of(config: ModelConfig, kind: str) -> dict[str, torch.Tensor]:
    """Random Hugging Face tensors: noise of all magnitudes, NaN, infinity and -0 included."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for parameter in param_mapping.parameters(config):
        dtype = {"fp32": torch.float32, "finite": torch.float32, "bf16": torch.bfloat16}.get(kind)
        dtype = dtype or (torch.float32 if "norm" in parameter.name else torch.bfloat16)
        for name, shape in hf_shapes(config, parameter).items():
            integers = torch.int32 if dtype == torch.float32 else torch.int16
            limits = torch.iinfo(integers)
            tensors[name] = torch.randint(
                limits.min, limits.max, shape, generator=generator, dtype=integers
            ).view(dtype)
            if kind == "finite":
                tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def hugging_face(folder: Path, config: ModelConfig, kind: str = "fp32", **more) -> dict[str, torch.Tensor]:
    """Writes a directory as other programs do, and returns its tensors."""
    folder.mkdir(parents=True)
    tensors = tensors_of(config, kind)
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        folder / "model.safetensors",
    )
    config_json = FAMILIES[config.family].write_config(config) | {
        "auto_map": {"AutoModel": "m.M"},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config_json | more))
    (folder / "modeling_internlm.py").write_text("raise SystemExit")
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Views the bytes as integers, so that NaN equals itself and 0 is not -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, types and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def written(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors in a folder, by the library itself."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def training_checkpoint(
    folder: Path,
    config: ModelConfig,
    full: dict[str, torch.Tensor],
    tokenizer: Path,
    chat_template: str | None = None,
) -> None:
    """Saves a checkpoint like a run of one rank, on data in this chat template."""
    run = Run(
        config,
        ParallelConfig(),
        OptimConfig(),
        DataConfig(tokenizer_name_or_path=str(tokenizer), chat_template=chat_template),
        TrainConfig(),
    )
    kinds = {"master": full} | {
        kind: {n: torch.ones_like(t) for n, t in full.items()} for kind in ("exp_avg", "exp_avg_sq")
    }
    fragments = [
        Fragment(name, kind, param_mapping.ShardSpec(tuple(t.shape)), 0, 0, t.flatten())
        for kind, tensors in kinds.items()
        for name, t in tensors.items()
    ]
    state = TrainState(step=7, samples=0, tokens=0)
    save_checkpoint(folder, state, run, reversed(fragments), {}, 0, 1, lambda: None)


def load_script(path: Path) -> ModuleType:
    """Imports a script as a module without running its `main`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the docstrings of its flags are looked up there
    spec.loader.exec_module(module)
    return module


def command(path: str, *args: str) -> None:
    """Runs the `main` of a script in tools/ckpt_convert in this process."""
    script = load_script(ROOT / "tools/ckpt_convert" / path)
    before, sys.argv = sys.argv, [path, *map(str, args)]
    try:
        script.main()
    finally:
        sys.argv = before
