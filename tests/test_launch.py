"""Recipes through the launcher: command lines, signals, restarts; `deepspeed`, `torchrun` are stand-ins."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import launch, recipes

from ascendspeed.models import families

RECIPE = "examples/intern/pretrain_internlm_7b_zero.sh"
GENERATION = "examples/intern/generate_internlm_7b_deepspeed.sh"


@pytest.fixture
def started(tmp_path):
    """Runs the recipe; returns its exit code and the command line that it would have started."""
    for name in ("deepspeed", "torchrun"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        path.chmod(0o755)

    def go(*flags: str, **env: str) -> tuple[int, str]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(launch.ROOT / RECIPE), *flags],
            env=recipes.clean(PATH=path, **env),
            cwd=recipes.inputs(tmp_path),
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return go


def test_defaults_are_the_published_run_on_every_device(started):
    code, output = started()
    assert code == 0
    assert output.startswith(
        "deepspeed --no_local_rank --master_port 29500 --log_level critical pretrain_intern.py --deepspeed "
        "--zero-stage 2 "
    )
    for words in (
        "--model internlm-7b",
        "--bf16",
        "--global-batch-size 256",
        "--lr 1.5e-4",
        "--load ./model_weights",
        "--save ./ckpt",
    ):
        assert words in output


def test_the_variables_for_a_gpu(started, tmp_path):
    (tmp_path / "deepspeed").write_text(
        '#!/bin/sh\necho "${PYTORCH_ALLOC_CONF} ${CUDA_DEVICE_MAX_CONNECTIONS-unset}"\n'
    )
    assert started()[1] == "expandable_segments:True unset\n"
    assert started(TP="2")[1] == "expandable_segments:True 1\n"
    given = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert started(TP="2", **given)[1] == "max_split_size_mb:512 8\n"


def test_values_from_the_environment_and_flags_at_the_end(started):
    _, output = started(
        "--train-iters", "7", NPROC="4", DTYPE="fp32", CHECKPOINT="", DATA="0.3 a 0.7 b", MASTER_PORT="1234"
    )
    assert "--master_port 1234 --log_level critical --num_accelerators 4 pretrain_intern.py" in output
    assert "--bf16" not in output
    assert "--load" not in output
    assert "--data-path 0.3 a 0.7 b --tokenizer" in output
    assert output.rstrip().endswith("--train-iters 7")


def test_several_nodes_by_a_hostfile(started, tmp_path):
    (tmp_path / "hosts").write_text("node0 slots=8\n")
    _, output = started(HOSTFILE="hosts", DATA="elsewhere")  # this node may have no data
    assert output.startswith(
        "deepspeed --no_local_rank --master_port 29500 --log_level critical --hostfile hosts "
        "pretrain_intern.py"
    )


def test_several_nodes_by_torchrun_on_each(started):
    _, output = started(NNODES="4", NODE_RANK="1", MASTER_ADDR="node0", NPROC="8")
    expected = (
        "torchrun --nnodes 4 --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 29500 "
        "-- pretrain_intern.py"
    )
    assert output.startswith(expected)


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"}, "NNODES=2 needs NPROC"),
        ({"DTYPE": "int8"}, "error: DTYPE=int8 is not one of bf16, fp16, fp32"),
        ({"TP": "abc"}, "error: "),
        ({"NPROC": "-3"}, "error: NPROC=-3 is not a whole number of at least 1"),
        ({"HOSTFILE": "hosst"}, "error: HOSTFILE=hosst: No such file or directory"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "error: this is one of 2 processes that srun started"),
        ({"NPROC": "2", "TP": "4"}, "start a multiple of 4 (NPROC=4)"),
    ],
)
def test_missing_variables_are_named(started, env, message):
    code, output = started(**env)
    assert (code, output.count("\n")) == (2, 1)
    assert message in output
    assert "pretrain_intern.py" not in output


def test_all_missing_inputs_are_named_before_anything_starts(started, tmp_path):
    """In one line, which the log has too, below the time, the host, the commit and the command line."""
    code, output = started(
        "--log-dir", "log", TOKENIZER_PATH="./no/tok", DATA="0.3 a 0.7 no/b", CHECKPOINT="./no/weights"
    )
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith(
        "error: missing: --tokenizer-name-or-path ./no/tok (a folder with tokenizer.model"
    )
    for words in ("--data-path no/b (no file has this prefix", "--load ./no/weights (no such folder)"):
        assert words in output
    assert "--data-path a " not in output
    start, error = (tmp_path / "log/train.log").read_text().splitlines()
    assert error == output.rstrip()
    expected = rf"start: \d{{4}}-\d\d-\d\d [\d:]+, host {os.uname().nodename}, commit \S+: bash .*{RECIPE}"
    assert re.match(expected, start)
    assert start.endswith("--log-dir log")


INJECTION = "BASH_VERSINFO[$(touch injected)0]"


@pytest.mark.parametrize("variable", ["TP", "PP"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "08", INJECTION])
def test_sizes_are_no_expressions(tmp_path, variable, value):
    done = subprocess.run(
        ["bash", str(launch.ROOT / GENERATION), "--prompt", "x"],
        env=recipes.clean(**{variable: value}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {variable}={value} is not a whole number of at least 1\n"
    assert not (tmp_path / "injected").exists()


def test_the_slurm_script_outside_of_slurm_is_one_line():
    script = launch.ROOT / "examples/intern/pretrain_internlm_65b.sbatch"
    done = subprocess.run(["bash", str(script)], env=recipes.clean(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: this is a script for Slurm: sbatch ")


# --- signals and restarts

LAUNCHER = """#!/usr/bin/env bash
# Like DeepSpeed's launcher: it does not forward SIGTERM, and its rank exits with a code of its own.
echo "$@" >> "$LOG"
RANK=0 bash -c '
    trap "echo term >> $LOG; exit 75" TERM
    trap "echo usr1 >> $LOG; exit 75" USR1
    echo ready >> $LOG
    for i in {1..600}; do sleep 0.05; done
' &
if [ -n "${CODES:-}" ]; then
    kill -9 $!
    n=$(grep -c pretrain "$LOG")
    code=$(cut -d' ' -f"$n" <<< "$CODES")
    [ "$code" != 0 ] || echo 0 > "$EXIT_CODE_FILE"  # as a rank that has ended well
    [ -z "${HIDES:-}" ] || { echo "$code" > "$EXIT_CODE_FILE"; code=1; }
    exit "$code"
fi
wait $!
exit $?
"""


@pytest.fixture
def recipe(tmp_path):
    """Starts the recipe over a stand-in for `deepspeed`; its arguments and signals are lines of `go.log`."""
    (tmp_path / "deepspeed").write_text(LAUNCHER)
    (tmp_path / "deepspeed").chmod(0o755)

    def go(*flags: str, **env: str) -> subprocess.Popen:
        environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(go.log), **env}
        return subprocess.Popen(
            ["bash", str(launch.ROOT / RECIPE), *flags],
            env=launch.environment() | environment,
            cwd=recipes.inputs(tmp_path),
            stderr=subprocess.PIPE,
            text=True,
        )

    go.log = tmp_path / "log"
    return go


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGTERM, "term"), (signal.SIGUSR1, "usr1"), (signal.SIGINT, "term")]
)
def test_a_signal_to_the_recipe_reaches_the_ranks(recipe, number, word):
    """And only them: the launcher waits for them, and their code comes out; no restart after that."""
    process = recipe(RESTARTS="3")
    while not recipe.log.exists() or "ready" not in recipe.log.read_text():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 75
    lines = recipe.log.read_text().splitlines()
    assert lines[1:] == ["ready", word]


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "starts"),
    [
        ("69 247 0", "3", 0, 3),  # twice lost
        ("69 69 69", "2", 69, 3),  # once too often
        ("69 0", "0", 69, 1),  # not asked for
        ("2 0", "3", 2, 1),  # the user's error stays one
        ("75 0", "3", 75, 1),  # somebody wanted it to stop
    ],
)
@pytest.mark.parametrize(
    "hides", ["", pytest.param("yes", marks=pytest.mark.slow)]
)  # as torchrun, which ends with 1 whatever its ranks ended with
def test_restarts(recipe, codes, restarts, code, starts, hides):
    if hides:
        codes = codes.replace("247", "69").replace(" 0", " 75")
        code = 75 if code == 0 else code
    process = recipe("--lr", "1", CODES=codes, RESTARTS=restarts, HIDES=hides)
    assert process.wait(60) == code
    lines = [line for line in recipe.log.read_text().splitlines() if "pretrain" in line]
    assert len(lines) == starts
    assert [line.endswith(" --auto-resume") for line in lines] == [False] + [True] * (starts - 1)
    assert all(line.count("--auto-resume") <= 1 for line in lines)


# --- before there are ranks

SLOW = """#!/usr/bin/env bash
# Like DeepSpeed's: a runner that imports, a launcher that imports, then the ranks; none forwards a signal.
echo runner >> "$LOG"
sleep "$FIRST"
bash -c '
    echo launcher >> "$LOG"
    sleep "$SECOND"
    RANK=0 bash -c "trap \\"\\" HUP; echo rank >> \\"\\$LOG\\"; exec sleep 600" &
    wait
' &
wait
"""


def alive(log) -> list[str]:
    """Processes that have this file in their environment."""
    mark = f"LOG={log}".encode()
    processes = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environment.read_bytes().split(b"\0"):
                processes.append(environment.parent.name)
    return processes


@pytest.fixture
def slow(tmp_path):
    """Starts a script over a `deepspeed` that takes its time; waits until a word is in the log."""
    (tmp_path / "deepspeed").write_text(SLOW)
    (tmp_path / "deepspeed").chmod(0o755)
    log = tmp_path / "log"

    def go(script: str, until: str, **env: str) -> subprocess.Popen:
        environment = {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(log),
            "NPROC": "2",
            "FIRST": "0",
            "SECOND": "0",
        }
        if script == GENERATION:
            environment["TP"] = "2"
        folder = Path(recipes.inputs(tmp_path))
        weights = folder / "model_weights"
        weights.mkdir(exist_ok=True)
        config = families.FAMILIES["internlm"].write_config(families.preset("internlm-7b"))
        (weights / "config.json").write_text(json.dumps(config))
        for name in ("model.safetensors", "tokenizer.model"):
            (weights / name).touch()
        process = subprocess.Popen(
            ["bash", str(launch.ROOT / script)],
            env=launch.environment() | environment | env,
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        while not log.exists() or until not in log.read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        return process

    go.log = log
    yield go
    for pid in alive(log):
        os.kill(int(pid), signal.SIGKILL)


FIRST, SECOND = ("runner", {"FIRST": "1"}), ("launcher", {"SECOND": "1"})
SIGNALS = [(GENERATION, *SECOND, signal.SIGINT)]
OTHER_SIGNALS = [
    (script, *moment, number)
    for script in (RECIPE, GENERATION)
    for moment in (FIRST, SECOND)
    for number in (signal.SIGTERM, signal.SIGINT)
    if (script, *moment, number) not in SIGNALS
]


@pytest.mark.parametrize(
    ("script", "until", "env", "number"),
    [*SIGNALS, *(pytest.param(*values, marks=pytest.mark.slow) for values in OTHER_SIGNALS)],
)
def test_a_signal_before_there_are_ranks_ends_all(slow, script, until, env, number):
    process = slow(script, until, **env)
    assert alive(slow.log)  # control: it is seen
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    interrupted = script == GENERATION and number == signal.SIGINT
    assert (process.returncode, errors.count("interrupted")) == ((130, 1) if interrupted else (143, 0))
    time.sleep(1.2)  # in which ranks would have come
    assert alive(slow.log) == []
    assert "rank" not in slow.log.read_text()


@pytest.mark.slow
def test_ctrl_c_of_answers_that_nobody_can_cut_short(slow):
    """A rank that does not listen to it ends; so does all, as interrupted."""
    process = slow(GENERATION, "rank")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert alive(slow.log) == []


@pytest.mark.parametrize("script", [GENERATION, pytest.param(RECIPE, marks=pytest.mark.slow)])
def test_a_killed_shell_leaves_no_ranks_behind(slow, script):
    """Answers have a session of their own, which a SIGKILL of the shell's group does not reach; of training
    only the shell is killed.
    """
    process = slow(script, "rank")
    if script == GENERATION:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    end = time.monotonic() + 30
    while alive(slow.log):
        assert time.monotonic() < end
        time.sleep(0.1)


# --- pipes

SCRIPTS = [
    path
    for pattern in ("*.sh", "*.sbatch")
    for path in launch.ROOT.rglob(pattern)
    if ".venv" not in path.parts
]
RACES = re.compile(r"\b(echo|printf|yes)\b[^|\n]*\|(?!\|)|\|\s*(head|grep -q)\b")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_pipe_can_end_a_script_by_sigpipe(script):
    """Under pipefail a writer whose reader ends first exits with 141: here-strings and variables do not."""
    lines = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    code = [re.sub(r"\s{2,}#.*|\bcase\b.*", "", line) for line in lines]
    assert not [line for line in code if RACES.search(line)]


def test_a_race_is_recognised():
    assert RACES.search('echo "$QUESTION" | MODEL=x bash run.sh')
    assert RACES.search("scontrol show hostnames | head -n 1")
    assert not RACES.search('cmd <<< "$TEXT" || echo failed')
