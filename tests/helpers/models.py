"""Tiny models in one process or under several ranks, beside the reference."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ascendspeed.config import schema
from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models import param_mapping
from helpers import launch

INTERNLM = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=125,
    max_position_embeddings=32,
    init_method_std=0.1,
)


def tensors_of(model: ModelConfig, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random weights; biases and norms random too, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in param_mapping.random_tensors(model, seed):
        tensors[name] = (
            tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.dim() == 1 else tensor
        )
    return tensors


def tokens_of(model: ModelConfig, length: int = 32) -> torch.Tensor:
    return torch.randint(0, model.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


def ours(cpu, model: ModelConfig, tensors, dtype="fp32", train: TrainConfig | None = None, quantize=None):
    from ascendspeed.models.gpt import gpt_model, layer_spec

    layout = ParallelConfig()
    built = gpt_model.build_model(
        model, layout, layer_spec.transformer_config(model, layout, train or TrainConfig(), dtype)
    )
    writer = {"write": gpt_model.quantizing_writer(8, built)} if quantize else {}
    gpt_model.load_weights(built, model, layout, tensors.items(), **writer)
    return built


@dataclass(frozen=True)
class Case:
    """One model under one layout."""

    layout: ParallelConfig
    model: ModelConfig
    tensors: dict[str, torch.Tensor]
    tokens: torch.Tensor


def under(cases: dict[str, Case], world: int, folder: Path):
    """name -> (logits of the real vocabulary, losses, logits of the padding, facts), in new processes."""
    job = {"cases": {}}
    for name, case in cases.items():
        save_file({n: t.contiguous() for n, t in case.tensors.items()}, folder / f"{name}.safetensors")
        run = schema.to_dict(Run(case.model, case.layout, OptimConfig(), DataConfig(), TrainConfig()))
        job["cases"][name] = {
            "run": run,
            "weights": str(folder / f"{name}.safetensors"),
            "tokens": case.tokens.tolist(),
        }
    facts = launch.ranks(world, "model_worker.py", job, folder)
    outputs = load_file(folder / "out.json.safetensors")
    rows = {name: case.model.vocab_size for name, case in cases.items()}
    return {
        n: (
            outputs[f"{n}.logits"][..., : rows[n]],
            outputs[f"{n}.losses"],
            outputs[f"{n}.logits"][..., rows[n] :],
            facts[n],
        )
        for n in cases
    }
