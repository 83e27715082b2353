"""What the shell launcher starts, seen through stand-ins for `deepspeed` and `torchrun` that print their words."""

import os
import subprocess

import launch
import pytest

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
        bare = {k: v for k, v in launch.environment().items() if k not in ("NPROC", "HOSTFILE", "NNODES", "MODEL", "DATA", "SAVE")}
        done = subprocess.run(["bash", RECIPE, *flags], env=bare | own, cwd=launch.ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return go


def test_as_it_stands_it_is_the_published_run_on_every_device(started):
    code, said = started()
    assert code == 0
    assert said.startswith("deepspeed --no_local_rank --master_port 29500 pretrain_intern.py --deepspeed --zero-stage 2 ")
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
    _, said = started("--train-iters", "7", NPROC="4", DTYPE="fp32", CHECKPOINT="", DATA="0.3 a 0.7 b", MASTER_PORT="1234")
    assert "--master_port 1234 --num_accelerators 4 pretrain_intern.py" in said
    assert "--bf16" not in said
    assert "--load" not in said
    assert "--data-path 0.3 a 0.7 b --tokenizer" in said
    assert said.rstrip().endswith("--train-iters 7")


def test_several_nodes_by_a_hostfile(started):
    _, said = started(HOSTFILE="hosts")
    assert said.startswith("deepspeed --no_local_rank --master_port 29500 --hostfile hosts pretrain_intern.py")


def test_several_nodes_by_torchrun_on_each(started):
    _, said = started(NNODES="4", NODE_RANK="1", MASTER_ADDR="node0", NPROC="8")
    wanted = "torchrun --nnodes 4 --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 29500 -- pretrain_intern.py"
    assert said.startswith(wanted)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"DTYPE": "int8"}, "error: DTYPE=int8 is not one of bf16, fp16, fp32"),
    ],
)
def test_what_is_missing_is_named(started, env, message):
    code, said = started(**env)
    assert code
    assert message in said
    assert "pretrain_intern.py" not in said
