"""Command lines of MindIE and MindFormers, typed verbatim; the launcher prints its arguments."""

import os
import subprocess

import pytest
from helpers import launch, recipes

SETTINGS = {
    *("NPROC", "HOSTFILE", "CHECKPOINT", "TOKENIZER_PATH", "TP", "PP", "DTYPE", "OUT", "DATA_PATH", "TASK"),
    *("BATCH", "MODEL"),
}


@pytest.fixture
def front(tmp_path):
    """Runs a shell script and returns (exit code, output)."""
    recipes.program(tmp_path, "python", '#!/bin/sh\necho python "$@"\n')
    environment = {k: v for k, v in launch.environment().items() if k not in SETTINGS}

    def front(script, *arguments, stdin=subprocess.DEVNULL, **env):
        extra = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **env}
        done = subprocess.run(
            ["bash", script, *arguments],
            env=environment | extra,
            cwd=launch.ROOT,
            stdin=stdin,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return front


def test_run_pa_without_input_asks_one_question(front, tmp_path):
    """MindIE's own; prompts of a file or a pipe are used instead."""
    script = "tasks/inference/run_pa.sh"
    assert front(script, "W")[1].endswith("--bf16 --input-texts What's deep learning?\n")
    for words in (["--input_file", "f"], ["--prompt", "x"], ["--task", "greedy"], ["--help"], ["chat"]):
        assert "deep learning" not in front(script, "W", *words)[1]
    assert "deep learning" not in front(script, "W", stdin=subprocess.PIPE)[1]
    (tmp_path / "prompts").write_text("hello\n")
    with open(tmp_path / "prompts") as file:
        assert "deep learning" not in front(script, "W", stdin=file)[1]


MINDIE = {
    "pa_fp16 performance [[32,16]] 1 internlm W 8": "benchmark.py --load W --tensor-model-parallel-size 8",
    "pa_bf16 performance [[32,16]] 4 internlm W 1": "--performance [[32,16]] --batch-size 4 --bf16",
    "fa_bf16 performance_maxbs [[8,8]] [[1,4]] 50 internlm2_7b W 2": "--ranges [[1,4]] --limit-ms 50 --bf16",
    "pa_fp16 performance [[32,16]] 1 internlm False W 1 --device cpu": "--batch-size 1 --fp16 --device cpu",
    "pa_fp16 full_BoolQ 1 internlm W 8": "evaluation.py --task boolq --task-data-path DATA",
    "pa_fp16 full_CEval 5 2 internlm W 1": "--batch-size 2 --distributed-backend nccl --fp16 --num-fewshot 5",
    "full_MMLU 0 1 internlm W 1 --limit 3": "--num-fewshot 0 --limit 3",
    "full_GSM8K 1 internlm W 1": "--task gsm8k",
}


@pytest.mark.parametrize("words", MINDIE)
def test_mindies_command_lines(words, front, tmp_path):
    """Verbatim, by the script of that name and by those that people try."""
    data = tmp_path / "DATA"
    data.mkdir()
    for script in ("run.sh", "benchmark.sh", "run_pa.sh"):
        if script == "run_pa.sh" and not words.startswith(("pa_", "fa_")):
            continue
        code, output = front(f"tasks/inference/{script}", *words.split(), DATA_PATH=str(data))
        assert code == 0, output
        assert MINDIE[words].replace("DATA", str(data)) in output
    assert "--bf16" in front("tasks/inference/run.sh", *words.split(), DATA_PATH=str(data), DTYPE="bf16")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pa_fp16 full_HumanEval 1 internlm W 8", "full_HumanEval is not available; the evaluation has mmlu"),
        ("pa_w8a8 performance [[8,8]] 1 internlm W 8", "pa_w8a8 is not available"),
        ("pa_fp16", "usage: benchmark.sh [pa_fp16|pa_bf16] performance LENGTHS BATCH"),
        ("pa_bf16 full_CEval 5 internlm W 8", "CHECKPOINT is not set"),
        (
            "pa_bf16 full_BoolQ 1 internlm W 8",
            "with them, type: TASK=boolq DATA_PATH=FOLDER BATCH=1 CHECKPOINT=W TP=8 DTYPE=bf16 "
            "TOKENIZER_PATH= bash tasks/evaluation/eval_internlm.sh",
        ),
    ],
)
def test_mindies_command_lines_that_cannot_run(words, message, front):
    code, output = front(
        "tasks/inference/run.sh", *words.split(), DATA_PATH="" if "BoolQ" in words else "DATA"
    )
    lines = [line for line in output.splitlines() if not line.startswith("note: ")]
    assert (code, len(lines)) == (2, 1), output
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_mindformers_prediction(front, tmp_path):
    script = "tasks/inference/run_internlm2_predict.sh"
    for name in ("model.ckpt", "tokenizer.model"):
        (tmp_path / name).write_text("")
    files = (str(tmp_path / "model.ckpt"), "8", str(tmp_path / "tokenizer.model"))
    code, output = front(script, "parallel", "predict.yaml", *files, "--max-new-tokens", "9")
    assert code == 0
    assert output.startswith("python -m ascendspeed.cli.launch --quiet tasks/inference/generate.py")
    assert f"--load {tmp_path} --tokenizer-name-or-path {tmp_path} --tensor-model-parallel-size 8 " in output
    asked = "--input-texts Hi, pls intro yourself Shanghai is a Huawei is a --max-new-tokens 9"
    assert asked in output
    assert "note: predict.yaml is not read" in output
    assert "--tensor-model-parallel-size 1 " in front(script, "single", "c", "W", "8", "T")[1]
    for words in (("single", "c", "W", "1"), ("both", "c", "W", "1", "T")):
        code, output = front(script, *words)
        assert (code, output.count("\n")) == (2, 1)
        assert output.startswith("error: ")
