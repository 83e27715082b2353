"""Recipes through the launcher: command lines, signals and restarts, with stand-ins for `deepspeed` and `torchrun`."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import launch

RECIPE = "examples/intern/pretrain_internlm_7b_zero.sh"


@pytest.fixture
def started(tmp_path):
    """Runs the recipe; returns its exit code and what it would have started."""
    for name in ("deepspeed", "torchrun"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        path.chmod(0o755)

    def go(*flags: str, **env: str) -> tuple[int, str]:
        own = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **env}
        bare = {
            k: v
            for k, v in launch.environment().items()
            if k not in ("NPROC", "HOSTFILE", "NNODES", "MODEL", "DATA", "SAVE")
        }
        done = subprocess.run(
            ["bash", RECIPE, *flags], env=bare | own, cwd=launch.ROOT, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return go


def test_as_it_stands_it_is_the_published_run_on_every_device(started):
    code, said = started()
    assert code == 0
    assert said.startswith(
        "deepspeed --no_local_rank --master_port 29500 pretrain_intern.py --deepspeed --zero-stage 2 "
    )
    for words in (
        "--model internlm-7b",
        "--bf16",
        "--global-batch-size 256",
        "--lr 1.5e-4",
        "--load ./model_weights",
        "--save ./ckpt",
    ):
        assert words in said


def test_values_from_the_environment_and_flags_at_the_end(started):
    _, said = started(
        "--train-iters", "7", NPROC="4", DTYPE="fp32", CHECKPOINT="", DATA="0.3 a 0.7 b", MASTER_PORT="1234"
    )
    assert "--master_port 1234 --num_accelerators 4 pretrain_intern.py" in said
    assert "--bf16" not in said
    assert "--load" not in said
    assert "--data-path 0.3 a 0.7 b --tokenizer" in said
    assert said.rstrip().endswith("--train-iters 7")


def test_several_nodes_by_a_hostfile(started):
    _, said = started(HOSTFILE="hosts")
    assert said.startswith(
        "deepspeed --no_local_rank --master_port 29500 --hostfile hosts pretrain_intern.py"
    )


def test_several_nodes_by_torchrun_on_each(started):
    _, said = started(NNODES="4", NODE_RANK="1", MASTER_ADDR="node0", NPROC="8")
    wanted = "torchrun --nnodes 4 --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 29500 -- pretrain_intern.py"
    assert said.startswith(wanted)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"}, "NNODES=2 needs NPROC"),
        ({"DTYPE": "int8"}, "error: DTYPE=int8 is not one of bf16, fp16, fp32"),
    ],
)
def test_what_is_missing_is_named(started, env, message):
    code, said = started(**env)
    assert (code, said.count("\n")) == (2, 1)
    assert message in said
    assert "pretrain_intern.py" not in said


# -- signals and restarts -----------------------------------------------------------------------------------------------------

LAUNCHER = """#!/usr/bin/env bash
# Like DeepSpeed's: it does not pass SIGTERM on; its rank takes a moment to save, and ends with a code of its own.
echo "$@" >> "$SAID"
RANK=0 bash -c '
    trap "echo told >> $SAID; exit 75" TERM
    trap "echo usr1 >> $SAID; exit 75" USR1
    echo ready >> $SAID
    for i in {1..600}; do sleep 0.05; done
' &
if [ -n "${CODES:-}" ]; then
    kill -9 $!
    n=$(grep -c pretrain "$SAID")
    code=$(cut -d' ' -f"$n" <<< "$CODES")
    [ -z "${HIDES:-}" ] || { echo "$code" > "$EXIT_CODE_FILE"; code=1; }
    exit "$code"
fi
wait $!
exit $?
"""


@pytest.fixture
def recipe(tmp_path):
    """Starts the recipe over a stand-in for `deepspeed`; what that was told stands in said."""
    (tmp_path / "deepspeed").write_text(LAUNCHER)
    (tmp_path / "deepspeed").chmod(0o755)

    def go(*flags: str, **env: str) -> subprocess.Popen:
        own = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SAID": str(go.said), **env}
        return subprocess.Popen(
            ["bash", RECIPE, *flags],
            env=launch.environment() | own,
            cwd=launch.ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    go.said = tmp_path / "said"
    return go


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGTERM, "told"), (signal.SIGUSR1, "usr1"), (signal.SIGINT, "told")]
)
def test_a_signal_to_the_recipe_reaches_the_ranks(recipe, number, word):
    """And only them: the launcher waits for them, and their code comes out; no restart after that."""
    process = recipe(RESTARTS="3")
    while not recipe.said.exists() or "ready" not in recipe.said.read_text():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 75
    lines = recipe.said.read_text().splitlines()
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
@pytest.mark.parametrize("hides", ["", "yes"])  # as torchrun, which ends with 1 whatever its ranks ended with
def test_restarts(recipe, codes, restarts, code, starts, hides):
    if hides:
        codes = codes.replace("247", "69").replace(" 0", " 75")
        code = 75 if code == 0 else code
    process = recipe("--lr", "1", CODES=codes, RESTARTS=restarts, HIDES=hides)
    assert process.wait(60) == code
    lines = [line for line in recipe.said.read_text().splitlines() if "pretrain" in line]
    assert len(lines) == starts
    assert [line.endswith(" --auto-resume") for line in lines] == [False] + [True] * (starts - 1)
    assert all(line.count("--auto-resume") <= 1 for line in lines)


# -- before there are ranks ---------------------------------------------------------------------------------------------------

SLOW = """#!/usr/bin/env bash
# Like DeepSpeed's: a runner that imports, then a launcher that imports, then the ranks; none of them passes a signal on.
echo runner >> "$SAID"
sleep "$FIRST"
bash -c '
    echo launcher >> "$SAID"
    sleep "$SECOND"
    RANK=0 bash -c "trap \\"\\" HUP; echo rank >> \\"\\$SAID\\"; exec sleep 600" &
    wait
' &
wait
"""
GENERATION = "examples/intern/generate_internlm_7b_deepspeed.sh"


def alive(said) -> list[str]:
    """Processes that have this file in their environment."""
    mark, found = f"SAID={said}".encode(), []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in place.read_bytes().split(b"\0"):
                found.append(place.parent.name)
    return found


@pytest.fixture
def slow(tmp_path):
    """Starts a script over a `deepspeed` that takes its time; waits until a word stands in `said`."""
    (tmp_path / "deepspeed").write_text(SLOW)
    (tmp_path / "deepspeed").chmod(0o755)
    said = tmp_path / "said"

    def go(script: str, until: str, **env: str) -> subprocess.Popen:
        own = {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "SAID": str(said),
            "NPROC": "2",
            "FIRST": "0",
            "SECOND": "0",
        }
        process = subprocess.Popen(
            ["bash", script],
            env=launch.environment() | own | env,
            cwd=launch.ROOT,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        while not said.exists() or until not in said.read_text():
            time.sleep(0.02)
        return process

    go.said = said
    yield go
    for pid in alive(said):
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("script", [RECIPE, GENERATION])
@pytest.mark.parametrize(("until", "env"), [("runner", {"FIRST": "1"}), ("launcher", {"SECOND": "1"})])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_there_are_ranks_ends_all(slow, script, until, env, number):
    process = slow(script, until, **env)
    assert alive(slow.said)  # control: it is seen
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    interrupted = script == GENERATION and number == signal.SIGINT
    assert (process.returncode, said.count("interrupted")) == ((130, 1) if interrupted else (143, 0))
    time.sleep(1.2)  # in which ranks would have come
    assert alive(slow.said) == []
    assert "rank" not in slow.said.read_text()


def test_ctrl_c_of_answers_that_nobody_can_cut_short(slow):
    """A rank that does not listen to it ends; so does all, as interrupted."""
    process = slow(GENERATION, "rank")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")
    assert alive(slow.said) == []


def test_a_killed_shell_leaves_no_answers_behind(slow):
    """The job has a session of its own, which a SIGKILL of the shell's group does not reach."""
    process = slow(GENERATION, "rank")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30
    while alive(slow.said):
        assert time.monotonic() < end
        time.sleep(0.1)
