"""LoRA against peft: the same model, adapters and batches, and every loss of the run, under both engines and on every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import oracle
import peft
import pytest
import torch
from safetensors.torch import save_file
from test_engine_deepspeed import DATA_SEED, RUN, Curve, worst

from ascendspeed import config, schedule, weights
from ascendspeed.config import LoraConfig, ModelConfig, ParallelConfig
from ascendspeed.formats import adapter as adapters
from ascendspeed.formats import peft as directory

STEPS = 10
LORA = LoraConfig(lora_rank=4, lora_alpha=6.0)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GQA = {"family": "internlm2", "num_query_groups": 2, "add_qkv_bias": False, "add_dense_bias": False}
BIASES, GROUPED = RUN.model, replace(RUN.model, **GQA)
RUN = replace(RUN, parallel=ParallelConfig(), optim=replace(RUN.optim, clip_grad=0.5))
TP, SP, PP = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
SHARDS = {"use_distributed_optimizer": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": True, "zero_stage": stage}


class Setting:
    """A model with adapters that peft made: as peft has them, and as a file for the engines' worker."""

    def __init__(self, model: ModelConfig, targets: tuple[str, ...], folder: Path) -> None:
        folder.mkdir()
        self.model, self.lora = model, replace(LORA, lora_target_modules=targets)
        self.base = dict(weights.random_tensors(model, RUN.train.seed))
        self.folder = folder
        torch.manual_seed(3)
        self.fresh().save_pretrained(folder / "peft")
        made = adapters.tensors_of(directory.open_adapter(folder / "peft"), model, self.lora)
        self.file = str(folder / "weights.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in (*self.base.items(), *made)}, self.file)

    def fresh(self, **changes: Any) -> peft.PeftModel:
        """B is not zero, so that the first step already has gradients for A."""
        settings = {"r": 4, "lora_alpha": 6, "target_modules": list(self.lora.lora_target_modules), "task_type": "CAUSAL_LM"}
        made = peft.LoraConfig(**settings | {"init_lora_weights": False} | changes)
        return peft.get_peft_model(oracle.hugging_face(replace(self.model, family="llama"), self.base), made)

    def loaded(self) -> peft.PeftModel:
        base = oracle.hugging_face(replace(self.model, family="llama"), self.base)
        return peft.PeftModel.from_pretrained(base, self.folder / "peft", is_trainable=True)

    def expected(self, frozen: bool = True) -> Curve:
        """Plain torch over peft's model."""
        model = self.loaded()
        if not frozen:
            model.requires_grad_(True)
        return train(model, self.model.vocab_size)

    def case(self, parallel: dict[str, Any], train: dict | None = None, lora: dict | None = None, **more: Any) -> dict[str, Any]:
        changes = {"model": vars(self.model), "parallel": parallel, "train": train or {}}
        changes["lora"] = {**vars(self.lora), "lora_target_modules": list(self.lora.lora_target_modules), **(lora or {})}
        return {"changes": changes, "weights": self.file, **more}


def train(model: torch.nn.Module, vocab: int, steps: int = STEPS) -> Curve:
    data = oracle.batches(vocab, STEPS, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED)[:steps]
    lrs = [schedule.lr_at(i, RUN.optim, RUN.train.train_iters) for i in range(steps)]
    return oracle.train(model, data, lrs, vars(RUN.optim))


def run(world: int, cases: dict[str, Any], folder: Path) -> dict[str, Curve]:
    job = {"run": config.to_dict(RUN), "steps": STEPS, "data_seed": DATA_SEED, "cases": cases}
    return launch.ranks(world, "engine_worker.py", job, folder)


@pytest.fixture(scope="module")
def biases(tmp_path_factory) -> Setting:
    return Setting(BIASES, ALL, tmp_path_factory.mktemp("biases") / "x")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Setting:
    """InternLM2, adapted under Llama's names; not every matrix of a linear has an adapter."""
    return Setting(GROUPED, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), tmp_path_factory.mktemp("grouped") / "x")


def exchanged(setting: Setting) -> str:
    """q's adapters in k's place, and the other way round."""
    from safetensors.torch import load_file

    held = load_file(setting.file)
    swapped = {name.replace("q_proj_", "#").replace("k_proj_", "q_proj_").replace("#", "k_proj_"): t for name, t in held.items()}
    path = str(setting.folder / "exchanged.safetensors")
    save_file(swapped, path)
    return path


def compare(curves: dict[str, Curve], expected: Curve) -> None:
    for name, curve in curves.items():
        loss, norm = worst(curve, expected)
        if name.startswith("control"):
            assert loss > 1e-5, name
        else:
            assert loss < 1e-5, (name, loss)
            assert norm < 1e-5, (name, norm)


def test_two_ranks_equal_peft(biases, grouped, tmp_path):
    layouts = {
        "tp2": TP,
        "tp2 sp": TP | SP,
        "pp2": PP,
        "dp2, shards": SHARDS,
        "zero 2 tp2 sp": TP | SP | zero(2),
        "zero 2": zero(2),
        "zero 3": zero(3),
    }
    cases = {}
    for which, setting in (("biases", biases), ("grouped", grouped)):
        cases |= {f"{which}/{name}": setting.case(parallel) for name, parallel in layouts.items()}
    cases["biases/recomputed"] = biases.case(TP, RECOMPUTE)
    cases["biases/zero 3, recomputed"] = biases.case(zero(3), {"recompute_granularity": "full"})
    cases["biases/control: alpha"] = biases.case(PP, lora={"lora_alpha": 6.1})
    cases["biases/control: q and k exchanged"] = biases.case(TP) | {"weights": exchanged(biases)}
    cases["biases/control: parts of A's gradient"] = biases.case(TP | SP) | {"break": "sequence-parallel sum"}
    cases["biases/control: nothing below the first layer"] = biases.case(TP, RECOMPUTE) | {"break": "adapters: _begin"}
    cases["biases/control: z's gradient not summed"] = biases.case(TP) | {
        "break": "adapters: copy_to_tensor_model_parallel_region"
    }
    found: dict[str, dict[str, Curve]] = {"biases": {}, "grouped": {}}
    for name, curve in run(2, cases, tmp_path).items():
        which, _, own = name.partition("/")
        found[which][own] = curve
    compare(found["biases"], biases.expected())
    compare(found["grouped"], grouped.expected())
    compare({f"control: not frozen, {name}": found["grouped"][name] for name in ("tp2", "zero 2")}, grouped.expected(frozen=False))
