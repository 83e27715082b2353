"""Runs with adapters by this project and by peft: equal model, adapters and batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from ascendspeed.config import lr_schedule, schema
from ascendspeed.config.schema import LoraConfig, ModelConfig, ParallelConfig
from ascendspeed.conversion.formats import peft as directory
from ascendspeed.models import param_mapping
from ascendspeed.models.lora import adapter as adapters
from helpers import launch, oracle
from helpers.engines import DATA_SEED, RUN, Curve
from helpers.megatron_themes import by_layout

STEPS = 10
LORA = LoraConfig(lora_rank=4, lora_alpha=6.0)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GQA = {"family": "internlm2", "num_query_groups": 2, "add_qkv_bias": False, "add_dense_bias": False}
BIASES, GROUPED = RUN.model, replace(RUN.model, **GQA)
RUN = replace(RUN, parallel=ParallelConfig(), optim=replace(RUN.optim, clip_grad=0.5))
TP, SP, PP = (
    {"tensor_model_parallel_size": 2},
    {"sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
)


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": True, "zero_stage": stage}


class Setting:
    """A model with adapters that peft made: as peft has them, and as a file for the engines' worker."""

    def __init__(self, model: ModelConfig, targets: tuple[str, ...], folder: Path) -> None:
        folder.mkdir()
        self.model, self.lora = model, replace(LORA, lora_target_modules=targets)
        self.base = dict(param_mapping.random_tensors(model, RUN.train.seed))
        self.folder = folder
        torch.manual_seed(3)
        self.fresh().save_pretrained(folder / "peft")
        tensors = adapters.training_tensors(directory.open_adapter(folder / "peft"), model, self.lora)
        self.file = str(folder / "weights.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in (*self.base.items(), *tensors)}, self.file)

    def fresh(self, **changes: Any) -> peft.PeftModel:
        """B is not zero, so that the first step already has gradients for A."""
        settings = {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": list(self.lora.lora_target_modules),
            "task_type": "CAUSAL_LM",
        }
        config = peft.LoraConfig(**settings | {"init_lora_weights": False} | changes)
        return peft.get_peft_model(
            oracle.hugging_face(replace(self.model, family="llama"), self.base), config
        )

    def loaded(self) -> peft.PeftModel:
        base = oracle.hugging_face(replace(self.model, family="llama"), self.base)
        return peft.PeftModel.from_pretrained(base, self.folder / "peft", is_trainable=True)

    def expected(self, frozen: bool = True) -> Curve:
        """Plain torch over peft's model."""
        model = self.loaded()
        if not frozen:
            model.requires_grad_(True)
        return train(model, self.model.vocab_size)

    def case(
        self, parallel: dict[str, Any], train: dict | None = None, lora: dict | None = None, **more: Any
    ) -> dict[str, Any]:
        changes = {"model": vars(self.model), "parallel": parallel}
        changes["train"] = train or {}
        changes["lora"] = {
            **vars(self.lora),
            "lora_target_modules": list(self.lora.lora_target_modules),
            **(lora or {}),
        }
        return {"changes": changes, "weights": self.file, **more}


def train(model: torch.nn.Module, vocab: int, steps: int = STEPS) -> Curve:
    data = oracle.batches(vocab, STEPS, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED)[:steps]
    lrs = [lr_schedule.lr_at(i, RUN.optim, RUN.train.train_iters) for i in range(steps)]
    return oracle.train(model, data, lrs, vars(RUN.optim))


def run(world: int, cases: dict[str, Any], folder: Path) -> dict[str, Curve]:
    cases = {name: cases[name] for name in by_layout(cases)}
    job = {"run": schema.to_dict(RUN), "steps": STEPS, "data_seed": DATA_SEED, "cases": cases}
    return launch.ranks(world, "engine_worker.py", job, folder, timeout=1800)


@pytest.fixture(scope="module")
def biases(tmp_path_factory) -> Setting:
    return Setting(BIASES, ALL, tmp_path_factory.mktemp("biases") / "x")
