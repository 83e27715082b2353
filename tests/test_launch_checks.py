"""Inference commands on several processes: what every rank would refuse is refused before one is started."""

import json
import os
import subprocess
import sys

import pytest
from helpers import launch as starts
from helpers import recipes

from ascendspeed.cli import launch
from ascendspeed.models.families import FAMILIES, PRESETS
from ascendspeed.utils.errors import UserError

GENERATE, BENCHMARK = "tasks/inference/generate.py", "tasks/inference/benchmark.py"
SERVE, NEEDLE = "tasks/inference/serve.py", "tasks/evaluation/needle.py"
EVALUATE = "tasks/evaluation/evaluation.py"
MMLU = ("--task", "mmlu", "--task-data-path", "tasks/evaluation/sample_mmlu")
LEGAL = {
    GENERATE: ("--prompt", "x"),
    SERVE: (),
    NEEDLE: (),
    BENCHMARK: ("--performance", "[[8,4]]"),
    EVALUATE: MMLU,
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of 8 heads and 4 layers, in the names of its files."""
    monkeypatch.chdir(starts.ROOT)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES["llama"].write_config(PRESETS["llama-tiny"])))
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).touch()
    return folder


def check(script: str, *flags: object, world: int | None = 2) -> None:
    launch._check_inference(script, list(map(str, flags)), launch.LaunchPlan(("x",), world=world))


@pytest.mark.parametrize("script", LEGAL)
def test_layouts_and_weights(script, model, tmp_path):
    legal = LEGAL[script]
    check(script, "--load", model, "--tp", 2, *legal)  # control
    for flags, world, message in (
        (("--load", model, "--tp", 3), 3, "do not split over 3 tensor-parallel ranks; choose 1, 2"),
        (("--load", model, "--pp", 3), 3, "4 layers do not split"),
        (("--load", model, "--tp", 2), 4, "4 processes were started, but TP 2 x PP 1 are 2; start NPROC=2"),
        (("--load", tmp_path / "none", "--tp", 2), 2, "none is not a directory"),
        (("--load", model, "--tp", 2, "--layers", 3), 2, "unknown flag --layers"),
    ):
        with pytest.raises(UserError, match=message):
            check(script, *flags, *legal, world=world)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no checkpoint: looked for Hugging Face weights"):
        check(script, "--load", model, "--tp", 2, *legal)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (GENERATE, ("--input-file", "no.jsonl"), r"--input-file no\.jsonl: there is no such file"),
        (GENERATE, ("--task", "chat", "--chat-template", "v9"), "--chat-template v9 does not exist; choose"),
        (GENERATE, ("--task", "greedy", "--temperature", "2"), "--temperature is for --task sample"),
        (GENERATE, ("--bf16", "--fp16"), "--bf16 and --fp16 contradict each other"),
        (SERVE, ("--chat-template", "v9"), "--chat-template v9 does not exist; choose"),
        (SERVE, ("--port", "99999"), "--port 99999: must be between 0 and 65535"),
        (NEEDLE, ("--chat", "--chat-template", "v9"), "--chat-template v9 does not exist; choose"),
        (NEEDLE, ("--haystack", "no.txt"), r"no\.txt"),
        (
            EVALUATE,
            ("--task", "mmlu", "--task-data-path", "no"),
            "--task-data-path no of mmlu is not a dir",
        ),
        (EVALUATE, ("--task", "mmlu"), "give one folder for each task"),
        (EVALUATE, (*MMLU, "--num-fewshot", "-1"), "--num-fewshot -1 is too small"),
        (BENCHMARK, ("--performance", "[[8,x]]"), "is not a list of pairs of integers"),
    ],
)
def test_what_a_command_needs(script, flags, message, model):
    with pytest.raises(UserError, match=message):
        check(script, "--load", model, "--tp", 2, *flags)


def test_everything_that_is_missing_is_one_message(model, tmp_path):
    with pytest.raises(UserError) as error:
        check(GENERATE, "--load", tmp_path / "none", "--tokenizer-name-or-path", tmp_path, "--tp", 2)
    assert "none is not a directory; " in str(error.value)
    assert f"{tmp_path}: no tokenizer here; looked for tokenizer.model and tokenizer.json" in str(error.value)
    (model / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no tokenizer here"):
        check(GENERATE, "--load", model, "--tp", 2)


def test_other_nodes_and_other_scripts_are_not_checked(tmp_path):
    """The nodes of a HOSTFILE may have what this one lacks."""
    check(GENERATE, "--load", tmp_path / "none", world=None)
    check("script.py", "--load", tmp_path / "none")


def test_nothing_is_started(model, tmp_path):
    """By the recipe, with a stand-in of DeepSpeed's launcher; the control starts it."""
    recipes.program(tmp_path / "bin", "deepspeed", '#!/bin/sh\necho "$@"\n')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    for tp in ("2", "3"):
        done = subprocess.run(
            ["bash", "examples/intern/generate_internlm_7b_deepspeed.sh", "--prompt", "x"],
            env=recipes.clean(PATH=path, TP=tp, CHECKPOINT=str(model), TOKENIZER_PATH=""),
            cwd=starts.ROOT,
            capture_output=True,
            text=True,
        )
        if tp == "2":
            assert (done.returncode, done.stderr) == (0, "")
            assert "--num_accelerators 2 tasks/inference/generate.py" in done.stdout
        else:
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith("error: 8 attention heads, 2 key/value heads")
            assert done.stderr.count("\n") == 1
