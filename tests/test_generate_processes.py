"""The generation command in processes of its own: ranks, kills, shell scripts, closed pipes."""

import contextlib
import importlib.util
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import forkserver, launch, oracle, recipes
from helpers.chat import UNUSED, piecewise, vocabulary
from helpers.generate_command import MODEL, folder, hf_continuation, records, reference, run
from helpers.log_lines import log_lines
from safetensors.torch import save_file

from ascendspeed.inference import args, benchmark_report, prompts
from ascendspeed.inference import stdin as questions
from ascendspeed.inference.benchmark_report import (
    BatchOutOfMemory,
    GenerationTimer,
    GenerationTiming,
    find_largest_batch,
    parse_pairs,
)
from ascendspeed.inference.output import AnswerWriter
from ascendspeed.models import families
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat, Message
from ascendspeed.utils.errors import UserError


def started(folder, world, flags, stdin, logs, tp=1, pp=1):
    """Runs the script on `world` ranks; returns (exit codes, stdout of rank 0, stderr of rank 0)."""
    (logs / "stdin").write_bytes(stdin)
    words = ["--load", str(folder), "--device", "cpu", *flags, "--tp", str(tp), "--pp", str(pp)]
    variables = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(launch.free_port())
    processes = []
    for rank in range(world):
        env = launch.environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank))
        log, errors = logs / f"stdout{rank}", logs / f"stderr{rank}"
        own_stdin = None if rank else logs / "stdin"
        script = launch.ROOT / "tasks/inference/generate.py"
        processes.append(forkserver.start_script(script, words, env, log, launch.ROOT, errors, own_stdin))
    for process in processes:
        process.join(300)
        process.kill()
    outputs = [(logs / f"stdout{rank}").read_text() for rank in range(world)]
    assert not any(outputs[1:]), "only rank 0 writes to stdout"
    return [process.exitcode for process in processes], outputs[0], (logs / "stderr0").read_text()


CHAT = (
    ["--task", "chat", "--max-new-tokens", "5"],
    'hi\n"""\n中文\nlines\n"""\nclear\nagain\nexit\n'.encode(),
)


def test_a_conversation_on_two_ranks(run, folder, tmp_path):
    codes, out, err = started(folder, 2, *CHAT, tmp_path, tp=2)
    assert codes == [0, 0], err
    assert out == run(*CHAT[0], stdin=CHAT[1])


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2)])
def test_on_stages(run, folder, tmp_path, tp, pp):
    (tmp_path / "a").mkdir()
    codes, out, err = started(folder, tp * pp, *CHAT, tmp_path / "a", tp=tp, pp=pp)
    assert not any(codes), err
    assert out == run(*CHAT[0], stdin=CHAT[1])
    flags = ["--task", "1", "2", "3", "5", "--max-new-tokens", "5"]
    codes, out, err = started(folder, tp * pp, flags, b"one\ntwo words\n", tmp_path, tp=tp, pp=pp)
    assert not any(codes), err
    alone = run(*flags, stdin="one\ntwo words\n")
    assert out.split("== logprobs")[0] == alone.split("== logprobs")[0]


@pytest.mark.slow
def test_a_killed_run_leaves_no_file(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    lines = "\n".join(f'"Document {i} says"' for i in range(4000))
    (tmp_path / "in.jsonl").write_text(lines)
    flags = [
        "--input-file",
        str(tmp_path / "in.jsonl"),
        "--output-file",
        str(out),
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    command = [
        sys.executable,
        str(launch.ROOT / "tasks/inference/generate.py"),
        "--load",
        str(folder),
        *flags,
    ]
    process = subprocess.Popen(
        command, env=launch.environment(), cwd=launch.ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    partial = tmp_path / "out.jsonl.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert partial.stat().st_size


@pytest.fixture
def shell(tmp_path):
    """Runs a shell script in which `python` and `deepspeed` print their arguments; returns (exit code,
    output)."""
    recipes.program(tmp_path, "deepspeed", '#!/bin/sh\necho deepspeed "$@"\n')
    recipes.program_python(tmp_path, 'echo python "$@"')
    settings = (
        "NPROC",
        "HOSTFILE",
        "NNODES",
        "MODEL",
        "CHECKPOINT",
        "TOKENIZER_PATH",
        "TP",
        "PP",
        "DTYPE",
        "OUT",
        "QUIET",
    )
    environment = {k: v for k, v in launch.environment().items() if k not in settings}

    def shell(script, *arguments, **env):
        extra = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **env}
        done = subprocess.run(
            ["bash", script, *arguments],
            env=environment | extra,
            cwd=launch.ROOT,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return shell


@pytest.fixture
def weights(tmp_path) -> str:
    """A folder with the names of a checkpoint of InternLM-7B, which are checked before processes start."""
    folder = tmp_path / "weights"
    folder.mkdir()
    config = families.FAMILIES["internlm"].write_config(families.preset("internlm-7b"))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).touch()
    return str(folder)


@pytest.mark.slow
def test_fronts(shell, tmp_path, weights):
    hosts = str(tmp_path / "hosts")
    Path(hosts).write_text("node0 slots=8\nnode1 slots=8\n")
    recipe = "examples/intern/generate_internlm_7b_deepspeed.sh"
    code, output = shell(recipe, "--prompt", "hi", MODEL="internlm-7b")
    assert code == 0
    assert output.startswith(
        "python tasks/inference/generate.py --load ./model_weights --tokenizer-name-or-path "
        "./dataset/internlm --model"
    )
    assert output.endswith("--mlp-layer-fusion --bf16 --prompt hi\n")
    given = {"CHECKPOINT": weights, "TOKENIZER_PATH": ""}
    _, output = shell(recipe, TP="4", PP="2", DTYPE="fp32", **given)
    assert output.startswith(
        "deepspeed --no_local_rank --master_port 29500 --log_level critical --num_accelerators 8 "
    )
    assert "8 tasks/inference/generate.py" in output
    assert "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2" in output
    assert "--bf16" not in output
    assert "--tokenizer-name-or-path" not in output
    assert f"--hostfile {hosts} tasks/inference/generate.py" in shell(recipe, TP="16", HOSTFILE=hosts)[1]
    assert shell(recipe, DTYPE="fp8")[0] == 2
    for script in ("run_pa.sh", "run_fa.sh"):
        _, output = shell(
            f"tasks/inference/{script}", "W", "chat", "--input_texts", "a b", "--max_output_length", "3"
        )
        assert "generate.py --load W --tensor" in output
        assert output.endswith("--bf16 --task chat --input_texts a b --max_output_length 3\n")
    _, output = shell("tasks/inference/run_pa.sh", "W")  # MindIE's question
    assert output.endswith("--bf16 --input-texts What's deep learning?\n")
    code, output = shell("tasks/inference/run_pa.sh")
    assert code == 2
    assert output.startswith("error: usage: ")


@pytest.mark.slow
def test_front_of_the_evaluation(shell, tmp_path, weights):
    hosts = str(tmp_path / "hosts")
    Path(hosts).write_text("node0 slots=8\nnode1 slots=8\n")
    given = {"CHECKPOINT": weights, "TOKENIZER_PATH": ""}
    evaluation = "tasks/evaluation/eval_internlm.sh"
    assert shell(evaluation)[1].startswith("python tasks/evaluation/evaluation.py --task mmlu ")
    assert "--num_accelerators 8 tasks/evaluation/evaluation.py" in shell(evaluation, TP="8", **given)[1]
    assert (
        f"--hostfile {hosts} tasks/evaluation/evaluation.py" in shell(evaluation, TP="16", HOSTFILE=hosts)[1]
    )
    assert (
        "--num_nodes 2 --num_accelerators 8 tasks"
        in shell(evaluation, TP="16", HOSTFILE=hosts, NNODES="2", NPROC="8")[1]
    )
    assert "NNODES=2 needs NODE_RANK" in shell(evaluation, TP="16", NNODES="2")[1]


@pytest.mark.slow
def test_front_of_the_table(shell, weights):
    script = "tasks/inference/benchmark.sh"
    code, output = shell(script, "performance", "[[256,256]]", "4", CHECKPOINT="W")
    assert code == 0
    assert output.startswith("python tasks/inference/benchmark.py --load W")
    assert output.endswith("--performance [[256,256]] --batch-size 4 --bf16\n")
    _, output = shell(script, "performance_maxbs", "[[256,256]]", "[[1,8]]", "50", "internlm", weights, "4")
    assert output.startswith("deepspeed")
    program = f"tasks/inference/benchmark.py --load {weights} --tensor-model-parallel-size 4"
    assert f"--num_accelerators 4 {program}" in output
    assert "--performance-maxbs [[256,256]] --ranges [[1,8]] --limit-ms 50 --bf16" in output
    for arguments in (
        (),
        ("performance",),
        ("performance", "[[1,1]]"),
        ("fly", "x", "y"),
        ("performance", "[[1,1]]", "1", "internlm"),
    ):
        code, output = shell(script, *arguments, CHECKPOINT="W")
        assert (code, output.count("\n")) == (2, 1)
        assert output.startswith("error: usage")


@pytest.mark.parametrize("flags", [("--batch-size", "1"), ("--task", "chat")], ids=["prompts", "chat"])
def test_closed_stdout(folder, flags, tmp_path):
    """`| head -1`: no traceback, and the exit code of a closed pipe."""
    pipe, errors, questions = (tmp_path / name for name in ("pipe", "errors", "questions"))
    os.mkfifo(pipe)
    questions.write_text("one\ntwo\n")
    program = tmp_path / "program.py"  # a fork has the stdout of its server, which is a file
    program.write_text(f"""
import runpy, sys
sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
runpy.run_path({str(launch.ROOT / "tasks/inference/generate.py")!r}, run_name="__main__")
""")
    words = ["--load", str(folder), "--device", "cpu", *flags, "--max-new-tokens", "1"]
    process = forkserver.start_script(
        program, words, launch.environment(), pipe, launch.ROOT, errors, questions
    )
    os.close(os.open(pipe, os.O_RDONLY))  # opens when the process does, and leaves before it writes
    process.join(300)
    assert process.exitcode == 128 + signal.SIGPIPE, errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert "BrokenPipe" not in errors.read_text()


def test_a_mistake_is_one_line_and_code_2(folder):
    done = launch.script("tasks/inference/generate.py", "--load", folder, "--tp", 2)
    assert (done.returncode, done.stdout) == (2, "")
    reason = "1 processes were started, but TP 2 x PP 1 are 2"
    assert done.stderr == f"error: {reason}; start NPROC=2, or choose other --tp and --pp\n"
