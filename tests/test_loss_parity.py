"""Origin of runs, and loss_parity.sh: hashes of values, halves on two machines, and real runs."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import launch, recipes
from helpers.loss_curves import CURVE, example_run, write_run
from helpers.training_logs import ours

from ascendspeed.config import schema
from ascendspeed.loss_compare import compare as comparing
from ascendspeed.loss_compare import origin, read_logs
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

# --- where the runs began


@pytest.mark.parametrize("name", ["seed", "weights", "data"])
def test_another_origin_is_refused(tmp_path, name):
    ref, cand = (
        write_run(tmp_path / "ref", CURVE, seed="1"),
        write_run(tmp_path / "cand", CURVE, **{name: "other"}),
    )
    with pytest.raises(UserError, match=f"the runs began with another {name}: ") as error:
        comparing.compare(ref, cand)
    assert "other in" in str(error.value)
    same = comparing.compare(ref, write_run(tmp_path / "same", CURVE, seed="1"), same_origin=True)
    assert same.origin == {"seed": "1", "weights": "w", "data": "d"}


@pytest.fixture
def began(tmp_path):
    """A log whose run read weights and data that are there; change(folder) makes another one of it."""
    import torch

    from ascendspeed.conversion import convert
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_factory
    from ascendspeed.models.param_mapping import parameters, random_tensor

    model = replace(
        families.preset("internlm-tiny"), num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=64
    )
    known = {p.name: p for p in parameters(model)}

    def weights(name: str, seed: int = 1, kind=None, values=torch.float32, dtype=torch.float32) -> str:
        make = from_factory(lambda n: random_tensor(model, known[n], seed).to(values).float())
        reader = CheckpointReader(
            "random", Path("random"), model, {}, dict.fromkeys(known, torch.float32), make, None
        )
        convert.convert(reader, str(tmp_path / name), kind or convert.HuggingFaceWriter(), dtype)
        if not (tmp_path / name / "config.json").exists():  # rank files do not bring one
            shutil.copyfile(tmp_path / "hf/config.json", tmp_path / name / "config.json")
        return str(tmp_path / name)

    for suffix in (".bin", ".idx"):
        (tmp_path / f"tokens{suffix}").write_bytes(suffix.encode())

    def log_of(load: str | None, seed: int = 1234, device: str = "cpu (AMD EPYC), gloo", **train) -> Path:
        run = example_run()
        settings = schema.TrainConfig(load=load, seed=seed, **train)
        run = replace(
            run, model=model, train=settings, data=schema.DataConfig(data_path=(str(tmp_path / "tokens"),))
        )
        head = f"device: {device}; 2 processes: TP 1 x DP 2"
        (tmp_path / "train.log").write_text(f"{head}\nrun: {json.dumps(asdict(run))}\n{ours(1, 2.0)}")
        return tmp_path / "train.log"

    log_of.weights = weights
    return log_of


def test_hashes_are_those_of_values_whatever_the_files(began, tmp_path):
    import torch

    from ascendspeed.conversion import convert

    first = origin.origin_of_log(began(began.weights("hf", values=torch.bfloat16, dtype=torch.bfloat16)))
    began.weights("tp2", kind=convert.RankFileWriter(tp=2, pp=2))
    assert first["seed"] == "1234"
    assert (
        origin.origin_of_log(began(began.weights("same", values=torch.bfloat16))) == first
    )  # the same values as fp32
    fp32 = origin.origin_of_log(began(began.weights("wide")))
    assert fp32["weights"] != first["weights"]  # not rounded to bf16: other values
    assert (
        origin.origin_of_log(began(str(tmp_path / "tp2")))["weights"] == fp32["weights"]
    )  # rank files of the same values
    assert origin.origin_of_log(began(began.weights("other", seed=2)))["weights"] != fp32["weights"]


def test_hash_of_data(began, tmp_path):
    first = origin.origin_of_log(began(None))
    assert first["weights"].startswith("random on cpu: ")
    assert origin.origin_of_log(began(None, seed=5))["weights"] != first["weights"]
    (tmp_path / "tokens.bin").write_bytes(b".bim")
    assert origin.origin_of_log(began(None))["data"] != first["data"]
    (tmp_path / "tokens.bin").unlink()
    with pytest.raises(UserError, match=r"tokens\.bin: cannot read the data"):
        origin.origin_of_log(began(None))


def test_random_weights_are_those_of_a_device(began, tmp_path):
    """Each kind of device has its own generator; a GPU's draws depend on its number of multiprocessors."""
    on = {
        device: origin.origin_of_log(began(None, device=device))["weights"]
        for device in (
            "cpu (AMD EPYC), gloo",
            "cpu (Xeon), gloo",
            "npu (Ascend910B), hccl",
            "cuda (A100), nccl",
            "cuda (H100), nccl",
        )
    }
    assert len(set(on.values())) == 4
    assert on["cpu (AMD EPYC), gloo"] == on["cpu (Xeon), gloo"]
    assert on["cuda (H100), nccl"].startswith("random on cuda H100: ")
    weights = began.weights("hf")  # that were read are the same everywhere
    assert len({origin.origin_of_log(began(weights, device=device))["weights"] for device in on}) == 1


def test_origin_of_what_is_none(began, tmp_path):
    (tmp_path / "step_0000001").mkdir()
    with pytest.raises(UserError, match="is a training checkpoint"):
        origin.origin_of_log(began(str(tmp_path)))
    (tmp_path / "other.log").write_text("hello\n")
    with pytest.raises(UserError, match="no line `run: "):
        origin.origin_of_log(tmp_path / "other.log")


# --- loss_parity.sh

PYTHON = """echo "python $*" >> "$WORK/said"
case "$1" in *parity_origin.py) echo "$2" > "$(dirname "$2")/origin.json" ;; esac
"""
LAUNCHER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$WORK/said"
while [ $# -gt 0 ]; do [ "$1" = --log-dir ] && { mkdir -p "$2"; echo run > "$2/train.log"; }; shift; done
"""


@pytest.fixture
def shell(tmp_path):
    """Runs loss_parity.sh with stand-ins; returns its exit code, what it started, and what it said."""
    recipes.program_python(tmp_path / "bin", PYTHON)
    recipes.program(tmp_path / "bin", "deepspeed", LAUNCHER)
    work = tmp_path / "work"
    work.mkdir()

    def go(**env: str) -> tuple[int, list[str], str]:
        (work / "said").unlink(missing_ok=True)
        own = {"WORK": str(work), "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        own |= {"DATA": f"0.3 {tmp_path}/a 0.7 {tmp_path}/b", "CHECKPOINT": str(tmp_path / "weights")}
        own |= {"TOKENIZER_PATH": str(recipes.inputs(tmp_path) / "tok")} | env
        bare = {
            k: v
            for k, v in launch.environment().items()
            if k not in ("NPROC", "HOSTFILE", "NNODES", "MODEL", "REF", "CAND")
        }
        done = subprocess.run(
            ["bash", "examples/intern/loss_parity.sh"],
            env=bare | own,
            cwd=launch.ROOT,
            capture_output=True,
            text=True,
        )
        commands = (work / "said").read_text().splitlines() if (work / "said").exists() else []
        return done.returncode, commands, done.stdout + done.stderr

    go.work = work
    return go


def test_two_runs_and_a_comparison(shell):
    code, commands, _ = shell(REF_NPROC="2", CAND_NPROC="4")
    assert code == 0
    ref, origin_of_ref, cand, origin_of_cand, compared = commands
    assert ref.startswith(
        "deepspeed --no_local_rank --master_port 29500 --log_level critical --num_accelerators 2 "
        "pretrain_intern.py --model internlm-tiny "
    )
    assert ref.endswith("--deepspeed --zero-stage 2")
    assert "--num_accelerators 4 " in cand
    assert cand.endswith("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2")
    common = [re.search(r"--data-path .* --log-interval 1", line)[0] for line in (ref, cand)]
    assert common[0] == common[1]
    for words in (
        "--data-path 0.3 a 0.7 b --tokenizer-name-or-path tok --load weights --seed 1234",
        "--lr 1e-3 --min-lr 1e-4",
    ):
        assert words in common[0].replace(f"{shell.work.parent}/", "")
    assert [line.split()[1] for line in (origin_of_ref, origin_of_cand)] == [
        "examples/intern/parity_origin.py"
    ] * 2
    assert compared == (
        f"python tools/compare_loss.py {shell.work}/ref {shell.work}/cand --out {shell.work} --profile "
        "published --same-origin"
    )


def test_a_run_leaves_no_older_verdict(shell):
    for name in ("parity.json", "parity.html"):
        (shell.work / name).write_text('{"verdict": "pass"}')
    assert shell(SIDE="ref")[0] == 0
    assert not list(shell.work.glob("parity.*"))


def test_halves_on_two_machines(shell):
    assert [line.split()[0] for line in shell(SIDE="ref")[1]] == ["deepspeed", "python"]
    assert (shell.work / "ref/origin.json").exists()
    _, commands, _ = shell(SIDE="cand", CAND="--deepspeed --device npu", DTYPE="bf16")
    assert commands[0].endswith("--bf16 --deepspeed --device npu")
    assert shell(SIDE="compare", PROFILE="strict")[1][0].endswith("--profile strict --same-origin")
    shell(SIDE="ref2")
    assert shell(SIDE="compare")[1][0].endswith(f"--same-origin --ref2 {shell.work}/ref2")
    assert len(shell(SIDE="compare")[1]) == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [({"SIDE": "left"}, "SIDE=left is not one of"), ({"DTYPE": "int8"}, "DTYPE=int8 is not one of")],
)
def test_what_the_shell_refuses(shell, env, message):
    code, started, text = shell(**env)
    assert (code, started) == (2, [])
    assert message in text


@pytest.mark.slow
def test_the_real_thing(tmp_path):
    """Two real runs of a tiny model: ZeRO-2 and the other engine with TP 2 x PP 2 have the same losses;
    another seed is refused.
    """
    env = {"WORK": str(tmp_path), "TRAIN_ITERS": "6", "PROFILE": "strict"}
    env |= {"MASTER_PORT": str(launch.free_port())}
    command = ["bash", "examples/intern/loss_parity.sh"]

    def go(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=launch.environment(**env, **more), cwd=launch.ROOT, capture_output=True, text=True
        )

    done = go()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = json.loads((tmp_path / "parity.json").read_text())
    assert table["figures"]["maximum"] < 1e-5
    assert table["origin"]["weights"].startswith("sha256: ")
    assert len(read_logs.read_log(tmp_path / "cand").steps) == 6
    assert go(SIDE="cand", SEED="99", CAND="--deepspeed", CAND_NPROC="1").returncode == 0
    done = go(SIDE="compare")
    assert done.returncode == 2
    assert "the runs began with another seed: 1234 in" in done.stderr
