"""Flags that have no effect without another one: refused or noted, and silent where they have one."""

import pytest

from ascendspeed.cli.effect_checks import NOTED, REFUSED
from ascendspeed.cli.train_args import resolve
from ascendspeed.planning import command
from ascendspeed.utils.errors import UserError

MOCK = ["--mock-data", "--model", "internlm-tiny", "--seq-length", "64"]
IN_VAIN = {
    "--ema-decay 0.9": "--save ckpt",
    "--lr-wsd-decay-style linear": "--lr-decay-style WSD --lr-wsd-decay-iters 10",
    "--rope-scaling-factor 2": "--rope-scaling-type linear",
    "--moe-router-topk 3": "--model mixtral-tiny",
    "--moe-ffn-hidden-size 64": "--model mixtral-tiny",
    "--moe-shared-expert-intermediate-size 64": "--model qwen2_moe-tiny",
    "--moe-router-pre-softmax": "--model mixtral-tiny",
    "--keep 2": "--save ckpt",
    "--async-save": "--save ckpt",
    "--finetune": "--load weights",
    "--eval-iters 3": "--eval-interval 5",
    "--wandb-exp-name a": "--report-to mlflow",
    "--wandb-entity a": "--wandb-project b",
    "--wandb-save-dir a": "--report-to wandb",
    "--min-lr 0.0001": "--lr-decay-style cosine",
    "--lr-decay-iters 50": "--lr-decay-style constant --lr-warmup-fraction 0.1",
    "--lr-decay-samples 50": "--lr-decay-style cosine",
}
"""Flag -> flags with which it has an effect."""
WITHOUT = {
    "--rope-scaling-factor": "--rope-scaling-type none",
    "--min-lr": "--lr-decay-style constant",
    "--lr-decay-iters": "--lr-decay-style constant",
    "--lr-decay-samples": "--lr-decay-style constant --train-samples 100 --global-batch-size 2",
}
"""Flag -> flags with which it has none; for the others no flag is enough."""


def texts(words: str) -> list[str]:
    """The refusal, or the notes, of a command line."""
    try:
        return resolve([*MOCK, *words.split()], 1)[1]
    except UserError as error:
        return [str(error)]


@pytest.mark.parametrize("flag", IN_VAIN)
def test_a_flag_without_effect(flag):
    name = flag.partition(" ")[0]
    without = WITHOUT.get(name, "")
    length = " --train-samples 100 --global-batch-size 2" if name == "--lr-decay-samples" else ""
    assert [text for text in texts(f"{without} {flag}") if text.startswith(flag)], flag
    assert not [text for text in texts(f"{IN_VAIN[flag]} {flag}{length}") if name in text], flag


def test_every_dependence_is_tested():
    names = {name for dependence in (*REFUSED, *NOTED) for name in dependence.names.split()}
    assert {flag.split()[0][2:].replace("-", "_") for flag in IN_VAIN} == names


def test_defaults_are_silent():
    """A complete configuration states them."""
    assert texts("--eval-iters 10 --initial-loss-scale 65536 --moe-router-topk 2") == []


def test_a_plan_needs_no_folder():
    assert command.resolve(["--model", "internlm-tiny", "--ema-decay", "0.9"])[1].train.ema_decay == 0.9
    with pytest.raises(UserError, match="keeps an average"):
        resolve([*MOCK, "--ema-decay", "0.9"], 1)
