"""Dry run of training: everything is checked and planned, nothing is started."""

import os
import re
import subprocess
import sys

import pytest
from helpers import launch as starts
from helpers import recipes, tiny_run

from ascendspeed.cli import launch
from ascendspeed.utils.errors import UserError

OF_A_RANK = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a process group in the process of the tests leaves behind."""


@pytest.fixture
def replaced(monkeypatch, tmp_path):
    """Environment of the launcher; returns the command by which it replaces itself, and WORLD_SIZE."""
    monkeypatch.setattr(launch, "Supervisor", None)  # a started process would fail
    calls = []

    def execvp(name, words):
        calls.append((words, launch.os.environ["WORLD_SIZE"]))
        raise SystemExit(0)

    monkeypatch.setattr(launch.os, "execvp", execvp)

    def go(*flags: str, **environment: str):
        monkeypatch.setenv("WORLD_SIZE", "1")  # so that it is unset afterwards: the launcher sets it
        for name in (*recipes.GIVEN, *OF_A_RANK):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            launch.start("pretrain_intern.py", [*tiny_run.flags(tmp_path), *flags], quiet=False)
        return calls.pop()

    return go


def test_the_launcher_starts_no_process(replaced, tmp_path):
    words, world = replaced("--dry-run", NPROC="8")
    assert (words[:2], world) == (("python", "pretrain_intern.py"), "8")
    (tmp_path / "hosts").write_text("a slots=8\n# later\nb slots=4\nc slots=8\n")
    hosts = str(tmp_path / "hosts")
    assert replaced("--dry_run", HOSTFILE=hosts)[1] == "20"
    assert replaced("--dry-run", HOSTFILE=hosts, NNODES="2", NPROC="6")[1] == "10"
    with pytest.raises(TypeError):  # control: a run is started
        replaced(NPROC="8")


def test_bad_input_stops_the_launcher(replaced):
    for flags, text in (
        (("--dry-run", "--tp", "3"), "TP 3|over 3"),
        (("--dry-run", "--load", "no"), "--load no"),
        (("--dry-run=yes",), "does not belong to any flag"),
    ):
        with pytest.raises(UserError, match=text):
            replaced(*flags, NPROC="8")


def test_everything_is_opened_and_planned(tmp_path):
    """The plan of one micro-batch of two samples on a CPU; no log, no checkpoint folder."""
    flags = [*tiny_run.flags(tmp_path), "--save", tmp_path / "a" / "ckpt", "--dry-run"]
    done = starts.script("pretrain_intern.py", *flags)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]
    assert "length: 2 steps of 2 samples x 32 = 64 tokens; 128 tokens in all" in done.stdout
    assert re.search(r"train data: \d+ samples of 32 tokens", done.stdout)
    assert re.search(r"planned for cpu kernels:\n *rank +weights.*\n *0 .*\npeak: 0\.\d\d GiB", done.stdout)
    assert done.stdout.endswith("dry run: everything was found; on 1 device the run can start\n")
    assert {path.name for path in tmp_path.iterdir()} == {"tokens"}


def test_damaged_data_are_refused(tmp_path):
    flags = [*tiny_run.flags(tmp_path), "--dry-run"]
    data = tmp_path / "tokens" / "data.bin"
    data.write_bytes(data.read_bytes()[:100])
    done = starts.script("pretrain_intern.py", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")


@pytest.mark.slow
def test_the_launcher_of_recipes_starts_nothing(tmp_path):
    """`python -m ascendspeed.cli.launch`, which recipes end with: neither DeepSpeed's launcher nor torchrun
    is called."""
    for name in ("deepspeed", "torchrun"):
        recipes.program(tmp_path / "bin", name, "#!/bin/sh\nexit 9\n")
    words = ["pretrain_intern.py", *tiny_run.flags(tmp_path), "--global-batch-size", "16"]
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def go(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "ascendspeed.cli.launch", *words, *flags],
            env=recipes.clean(PATH=path, NPROC="8"),
            cwd=starts.ROOT,
            capture_output=True,
            text=True,
        )

    done = go("--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 8 devices the run can start" in done.stdout
    assert go().returncode == 9  # control


def test_deepspeeds_file_is_checked_without_a_launcher(tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1.0}')
    own = ("--deepspeed", "--deepspeed_config", tmp_path / "ds.json", "--dry-run")
    flags = [*tiny_run.flags(tmp_path), *own]
    done = starts.script("pretrain_intern.py", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-3000:]
    assert "gradient_cliping" in done.stderr
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    assert "dry run: everything was found" in starts.must("pretrain_intern.py", *flags)


@pytest.mark.parametrize(("words", "noted"), [([], True), (["--model", "internlm-tiny"], False)])
def test_the_default_architecture_is_named(words, noted, tmp_path, monkeypatch):
    """A forgotten --model would train a 7B with random weights without a word."""
    from ascendspeed.commands import train

    (tmp_path / "data.idx").touch()
    monkeypatch.setattr("sys.argv", ["x", "--data-path", str(tmp_path / "data"), "--dry-run", *words])
    monkeypatch.setattr(train, "dry_run", lambda run, notes: notes)
    assert ("neither --model nor --load is given: the model is internlm-7b" in train.main()) == noted
