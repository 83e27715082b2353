"""The 65B recipes and their Slurm template: values on 32 devices; commands of four nodes, Slurm replaced.

Slow: both recipes with a tiny model on two nodes of two processes by the template, stopped and submitted
again, compared with one process.
"""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers import corpus, launch, recipes
from helpers.recipes import INTERN, clean, program

from ascendspeed.cli.train_args import resolve
from ascendspeed.config.schema import ParallelConfig, Run
from ascendspeed.data.indexed.megatron_pair import PairWriter
from ascendspeed.models import estimates
from ascendspeed.models.families import PRESETS
from ascendspeed.training.metric_lines import TrainLine, read_lines
from ascendspeed.utils.errors import UserError

RECIPES = {
    "zero": INTERN / "pretrain_internlm_65b_zero.sh",
    "ptd": INTERN / "pretrain_internlm_65b_ptd_32p.sh",
}
SBATCH = INTERN / "pretrain_internlm_65b.sbatch"
GIB = 2**30


# --- the values


@pytest.fixture(scope="module")
def default_words(tmp_path_factory):
    """The flags that a recipe gives to pretrain_intern.py, if nobody gives it values."""
    return cache(lambda name: recipes.typed(RECIPES[name], tmp_path_factory.mktemp(name)))


@pytest.fixture
def typed(default_words, tmp_path, monkeypatch):
    """The flags that a recipe gives to pretrain_intern.py."""
    monkeypatch.chdir(tmp_path)  # where there is no ./ckpt

    def words(name: str, *flags: str, **env: str) -> list[str]:
        changed = flags or env
        return recipes.typed(RECIPES[name], tmp_path, *flags, **env) if changed else default_words(name)

    return words


def resolved(words: list[str], world: int = 32) -> Run:
    return resolve(words, world)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_values_on_32_devices(typed, name):
    run = resolved(typed(name))
    assert run.model == PRESETS["internlm-65b"]
    assert (run.train.micro_batch_size, run.train.global_batch_size, run.data.seq_length) == (2, 128, 2048)
    assert (run.train.train_iters, run.optim.lr_decay_iters) == (50000, 50000)
    optim = run.optim
    assert (optim.lr, optim.min_lr, optim.lr_decay_style, optim.clip_grad) == (1e-4, 1e-5, "cosine", 1.0)
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_eps, optim.weight_decay) == (0.9, 0.95, 1e-8, 1e-2)
    assert (optim.dtype, optim.initial_loss_scale) == ("bf16", 2**19)
    assert (run.train.load, run.train.save) == ("./ckpt", "./ckpt")
    recomputation = run.train.recompute_granularity, run.train.auto_recompute_device_size
    assert recomputation == (("full", None) if name == "zero" else ("none", 55296))
    assert run.train.use_fused_rotary_pos_emb
    assert run.train.mlp_layer_fusion


def test_the_layouts(typed):
    zero, ptd = resolved(typed("zero")), resolved(typed("ptd"))
    assert (zero.parallel.deepspeed, zero.parallel.zero_stage, zero.parallel.model_size) == (True, 3, 1)
    assert ptd.parallel == ParallelConfig(
        tensor_model_parallel_size=8, pipeline_model_parallel_size=4, sequence_parallel=True
    )
    for words, world in ((typed("zero"), 31), (typed("ptd"), 48)):  # control: the layout is checked
        with pytest.raises(UserError, match=f"not a multiple|{world} processes do not split"):
            resolved(words, world)


@pytest.mark.slow
def test_values_from_the_environment_and_flags_at_the_end(typed):
    run = resolved(typed("ptd", "--train-iters", "7", TP="4", PP="2", SAVE="there", DEVICE_MEMORY=""), 8)
    assert (run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size) == (4, 2)
    assert (run.train.load, run.train.save, run.train.train_iters) == ("there", "there", 7)
    assert (run.train.recompute_granularity, run.train.auto_recompute_device_size) == ("none", None)
    run = resolved(
        typed(
            "ptd",
            "--recompute-granularity",
            "full",
            "--recompute-method",
            "block",
            "--recompute-num-layers=10",
        )
    )
    assert (run.train.recompute_method, run.train.recompute_num_layers) == ("block", 10)
    assert resolved(typed("zero", CHECKPOINT="", RECOMPUTE="none")).train.load is None


@pytest.mark.parametrize("name", RECIPES)
def test_the_memory_that_is_said_on_top(typed, name):
    """Model states, and layer inputs in flight: 2 bytes x tokens x hidden size, 80 on the first stage."""
    run = resolved(typed(name))
    states = estimates.model_states(
        run.model, run.parallel, 32 // run.parallel.model_size, "bf16", fp32_gradients=True
    ).total
    tokens = run.data.seq_length * run.train.micro_batch_size
    inputs = 80 * 2 * tokens * run.model.hidden_size / run.parallel.tensor_model_parallel_size
    text = RECIPES[name].read_text()
    assert f"{states / GIB:.1f} GiB of model states" in text
    assert f"{inputs / GIB:.1f} GiB of layer inputs" in text
    assert f"checkpoints of {estimates.checkpoint_bytes(run.model) / GIB:.0f} GiB" in text


# --- the Slurm template

SRUN = """#!/usr/bin/env bash
# A task on every node, here: all nodes are this machine.
tasks=1
while [[ $1 = --* ]]; do case $1 in --ntasks=*) tasks=${1#*=} ;; esac; shift; done
pids=()
for ((n = 0; n < tasks; n++)); do SLURM_NODEID=$n "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames nodes[0-3]" ] && printf "127.0.0.1\\nnode1\\n"\n'
TORCHRUN = """#!/usr/bin/env bash
# A launcher with one rank, which saves and leaves when it is told.
echo "$NODE_RANK: $*" >> "$SAID"
[ -n "${LASTS:-}" ] || exit "${CODE:-0}"
RANK=$NODE_RANK bash -c '
    trap "echo told $RANK >> $SAID; exit 75" USR1
    echo ready >> $SAID
    for i in {1..300}; do sleep .1; done' &
wait $!
"""


class Slurm:
    """Runs a copy of the template as `sbatch` would, from a folder without an environment to activate."""

    def __init__(self, folder: Path, nodes: int, real: bool = False) -> None:
        self.folder, self.said, self.nodes = folder, folder / "said", nodes
        program(folder / "bin", "srun", SRUN)
        program(folder / "bin", "scontrol", SCONTROL)
        if not real:
            program(folder / "bin", "torchrun", TORCHRUN)
        (folder / "copy").write_text(SBATCH.read_text())
        recipes.inputs(folder)
        for name in ("examples", "pretrain_intern.py"):
            (folder / name).symlink_to(launch.ROOT / name)

    def sbatch(self, *words: str, **env: str) -> subprocess.Popen:
        job = {
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "nodes[0-3]",
        }
        path = os.pathsep.join(
            [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        env = clean(PATH=path, SAID=str(self.said), SLURM_JOB_NUM_NODES=str(self.nodes)) | job | env
        command = ["bash", str(self.folder / "copy"), *words]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_for(self, text: str, times: int) -> None:
        for _ in range(600):
            if self.said.exists() and self.said.read_text().count(text) >= times:
                return
            time.sleep(0.05)
        raise AssertionError(f"not {times} times {text!r}")


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path, 4)


@pytest.mark.slow
def test_every_node_starts_the_recipe(slurm):
    job = slurm.sbatch()
    assert (job.wait(60), job.stdout.read()) == (0, "")
    nodes = sorted(slurm.said.read_text().splitlines())
    expected = "--nnodes 4 --node-rank {n} --nproc-per-node 8 --master-addr 127.0.0.1 --master-port 22345 "
    expected += "-- pretrain_intern.py "
    assert len(nodes) == 4
    for n, line in enumerate(nodes):
        assert line.startswith(f"{n}: {expected.format(n=n)}")
        assert "--pipeline-model-parallel-size 4 --sequence-parallel" in line
        assert line.endswith(" --auto-resume")
    assert not list(slurm.folder.glob(".sbatch*"))


@pytest.mark.slow
def test_another_recipe_values_and_flags(slurm):
    job = slurm.sbatch(str(RECIPES["zero"]), "--keep", "3", NPROC="16", MASTER_PORT="1234", MICRO_BATCH="1")
    assert job.wait(60) == 0
    for line in slurm.said.read_text().splitlines():
        assert (
            "--nproc-per-node 16 --master-addr 127.0.0.1 --master-port 1234 -- pretrain_intern.py "
            "--deepspeed --zero-stage 3" in line
        )
        assert "--micro-batch-size 1 " in line
        assert line.endswith(" --auto-resume --keep 3")


def test_the_code_of_a_node_is_that_of_the_job(tmp_path):
    assert Slurm(tmp_path, 2).sbatch(CODE="1", NPROC="16").wait(60) == 1


@pytest.mark.slow
def test_the_signal_before_the_end_reaches_the_ranks_of_every_node(slurm):
    """To the batch script only, as by `--signal=B:USR1@...`; launchers must live until ranks have saved."""
    job = slurm.sbatch(LASTS="yes", RESTARTS="3")
    slurm.wait_for("ready", 4)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75
    lines = slurm.said.read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("told")) == [f"told {n}" for n in range(4)]
    assert sum("pretrain_intern.py" in line for line in lines) == 4  # RESTARTS is not for this
    assert not list(slurm.folder.glob(".sbatch*"))


# --- for real, tiny

ITERS, STOP = 6, 3
TINY = {
    "MODEL": "internlm-tiny",
    "DTYPE": "fp32",
    "SEQ_LENGTH": "64",
    "GLOBAL_BATCH": "16",
    "TRAIN_ITERS": str(ITERS),
    "LR_DECAY_ITERS": str(ITERS),
    "LR": "1e-2",
    "EVAL_INTERVAL": "100",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Random tokens of a skewed distribution, in 300 documents, and a tokenizer of as many ids."""
    folder, drawn = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    corpus.sentencepiece_dir(folder, 400)
    lengths = drawn.integers(40, 120, 300)
    tokens = (drawn.exponential(30, lengths.sum()) % 400).astype(np.uint16)
    with PairWriter(folder / "text", tokens.dtype) as pair:
        pair.add(tokens, lengths)
        pair.commit({"vocab_size": 400})
    return {"DATA": str(folder / "text"), "TOKENIZER_PATH": str(folder)}


def losses(log: Path) -> list[float]:
    return [line.loss for line in read_lines(log / "train.log") if isinstance(line, TrainLine)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [("zero", {}), ("ptd", {"TP": "2", "PP": "2"})])
def test_two_nodes_give_the_curve_of_one_process(tmp_path, data, name, layout):
    """From random weights in an empty folder; stopped and submitted again: the curve of one process."""
    values = TINY | data | {"SAVE": str(tmp_path / "ckpt")}
    cluster = Slurm(tmp_path / "cluster", 2, real=True)
    for more in (("--exit-interval", str(STOP)), ()):
        flags = ("--log-dir", str(tmp_path / "two.log"), *more)
        job = cluster.sbatch(
            str(RECIPES[name]), *flags, NPROC="2", MASTER_PORT=str(launch.free_port()), **values, **layout
        )
        output, _ = job.communicate(timeout=600)
        assert job.returncode == 0, output[-3000:]
        assert "random weights" in output if more else f"iteration {STOP}" in output
    for other, seed in (("one", "1234"), ("other", "4321")):
        env = values | {
            "SAVE": str(tmp_path / other),
            "NPROC": "1",
            "TP": "1",
            "PP": "1",
            "MASTER_PORT": str(launch.free_port()),
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(RECIPES[name]), "--log-dir", str(tmp_path / f"{other}.log"), "--seed", seed]
        done = subprocess.run(
            command, env=clean(PATH=path, **env), cwd=launch.ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-3000:]
    curve = losses(tmp_path / "one.log")
    assert len(curve) == ITERS
    assert losses(tmp_path / "two.log") == pytest.approx(curve, rel=1e-5)
    assert losses(tmp_path / "other.log") != pytest.approx(curve, rel=1e-3)  # control: another seed
