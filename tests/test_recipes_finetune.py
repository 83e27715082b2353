"""The recipes of fine-tuning: their values on 8 devices, and on two nodes."""

import pytest
from helpers import recipes

from ascendspeed.cli.train_args import resolve
from ascendspeed.config.schema import LoraConfig, Run
from ascendspeed.models.families import PRESETS
from ascendspeed.utils.errors import UserError

RECIPES = {
    name: recipes.INTERN / f"finetune_{name}.sh"
    for name in ("internlm2_7b_alpaca", "internlm_7b_alpaca", "internlm2_lora")
}
RECIPES["dpo"] = recipes.INTERN / "dpo_internlm2_7b.sh"


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """Resolves the flags of a recipe for `world` processes."""
    monkeypatch.chdir(tmp_path)

    def go(name: str, *flags: str, world: int = 8, **env: str) -> Run:
        return resolve(recipes.typed(RECIPES[name], tmp_path, *flags, **env), world)[0]

    return go


def test_the_values_of_mindformers_yaml(resolved):
    run = resolved("internlm2_7b_alpaca")
    assert run.model == PRESETS["internlm2-7b"]
    data, optim, train = run.data, run.optim, run.train
    assert (data.data_path, data.packing, data.seq_length) == (("./dataset/alpaca",), "none", 2048)
    assert (train.micro_batch_size, train.global_batch_size, train.train_epochs, train.seed) == (
        2,
        16,
        2,
        0,
    )  # 2 on each of 8
    assert (optim.lr, optim.min_lr, optim.lr_decay_style, optim.lr_warmup_fraction) == (
        2e-5,
        0,
        "cosine",
        0.025,
    )
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_eps, optim.weight_decay) == (0.9, 0.95, 1e-8, 0.01)
    assert (optim.clip_grad, optim.dtype) == (1.0, "bf16")
    assert (run.parallel.zero_stage, run.parallel.model_size) == (2, 1)
    assert (train.save_interval, train.keep, train.finetune) == (500, 1, True)
    assert (train.load, run.lora) == ("./model_from_hf/internlm2-7b", LoraConfig())


def test_preference_pairs(resolved):
    run = resolved("dpo")
    assert run.model == PRESETS["internlm2-7b"]
    assert (run.preference.stage, run.preference.loss, run.preference.beta) == ("dpo", "dpo", 0.1)
    assert (run.data.data_path, run.data.packing) == (("./dataset/preference",), "none")
    assert (run.optim.lr, run.train.train_epochs, run.train.finetune, run.lora) == (
        5e-7,
        1,
        True,
        LoraConfig(),
    )
    simpo = resolved("dpo", "--simpo-gamma", "1.4", LOSS="simpo", BETA="2.5")
    assert (simpo.preference.loss, simpo.preference.beta, simpo.preference.simpo_gamma) == ("simpo", 2.5, 1.4)


def test_internlm_and_adapters_in_packed_rows(resolved):
    full, lora = resolved("internlm_7b_alpaca"), resolved("internlm2_lora")
    assert (full.model, lora.model) == (PRESETS["internlm-7b"], PRESETS["internlm2-7b"])
    assert full.data.packing == lora.data.packing == "first-fit"
    assert full.lora == LoraConfig()
    every = ("wqkv", "wo", "w1", "w3", "w2")
    assert lora.lora == LoraConfig(lora_rank=16, lora_alpha=16, lora_dropout=0.05, lora_target_modules=every)
    assert lora.optim.lr == 10 * full.optim.lr
    assert resolved("internlm2_lora", LORA_TARGETS="wqkv wo").lora.lora_target_modules == ("wqkv", "wo")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if n else []) for n, name in enumerate(RECIPES)]
)
def test_values_from_outside_and_two_nodes(resolved, name):
    given = {
        "MODEL": "internlm2-1.8b",
        "PACKING": "internlm-cut",
        "EPOCHS": "0.5",
        "TP": "2",
        "CHECKPOINT": "there",
    }
    with pytest.raises(UserError, match="--packing"):  # a control: values are read
        resolved(name, **given)
    nodes = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0", "NPROC": "8", "starter": "torchrun"}
    run = resolved(
        name, "--lr", "1e-6", world=16, **given | nodes | {"PACKING": "internevo-cut", "GLOBAL_BATCH": "32"}
    )
    assert (run.model, run.data.packing) == (PRESETS["internlm2-1.8b"], "internevo-cut")
    assert (run.train.train_epochs, run.optim.lr, run.train.load) == (0.5, 1e-6, "there")
    assert run.parallel.tensor_model_parallel_size == 2
    run = resolved(name, EPOCHS="", TRAIN_ITERS="70", VALID="0.5 a 0.5 b", EVAL_INTERVAL="7")
    assert (run.data.valid_data_path, run.train.eval_interval) == (("0.5", "a", "0.5", "b"), 7)
    assert (run.train.train_epochs, run.train.train_iters) == (None, 70)
