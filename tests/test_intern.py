"""Console script `intern`: commands, launch, completion; the package's metadata."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import launch, tiny_run
from packaging.requirements import Requirement

import ascendspeed
from ascendspeed.cli.launch import LaunchPlan
from ascendspeed.commands import intern
from ascendspeed.utils.errors import EXIT_USER_ERROR, UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "megatron", "deepspeed", "transformers", "numpy", "tyro", "rich"}


def pins() -> dict[str, str]:
    lines = [
        line
        for name in ("requirements.txt", "requirements-npu.txt", "requirements-docs.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    return {
        name.lower().replace("_", "-"): version
        for name, version in (
            line.partition(";")[0].split("==") for line in lines if "==" in line and not line.startswith("#")
        )
    }


def ranges() -> dict[str, Requirement]:
    texts = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        texts += extra
    parsed = [Requirement(text) for text in texts]
    return {r.name.lower().replace("_", "-"): r for r in parsed if r.name != "ascendspeed"}


def outside(pinned: dict[str, str]) -> set[str]:
    """Names whose pin is missing, is superfluous, or is outside of the range."""
    wanted = ranges()
    return (wanted.keys() ^ pinned.keys()) | {
        name
        for name in wanted.keys() & pinned.keys()
        if not wanted[name].specifier.contains(pinned[name]) or "<" not in str(wanted[name].specifier)
    }


def test_pins_are_within_their_ranges():
    assert outside(pins()) == set()
    assert outside({**pins(), "torch": "3.0.0"}) == {"torch"}  # control
    assert outside({**pins(), "unheard-of": "1"}) == {"unheard-of"}


def test_extras():
    assert set(PROJECT["optional-dependencies"]) == {
        "eval",
        "serve",
        "streaming",
        "gpu",
        "npu",
        "docs",
        "dev",
    }


def test_help_needs_no_library():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ascendspeed.commands.intern", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    modules = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "ascendspeed" in modules
    assert not HEAVY & modules
    assert all(f"  {command.name} " in done.stdout for command in intern.available())


def run_intern(monkeypatch, *words: str) -> int:
    """Exit code of `intern WORDS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["intern", *words])
    return intern.main()


def test_version(monkeypatch, capsys):
    assert run_intern(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"ascendspeed {ascendspeed.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "no command 'tran' (perhaps train); choose train, data"),
        (["--completion", "fish"], "choose bash, zsh"),
        (["train", "--nproc", "0"], "--nproc 0: give the number of processes"),
        (["serve", "--nproc"], "--nproc: give the number of processes"),
    ],
)
def test_mistakes(monkeypatch, words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_intern(monkeypatch, *words)


def test_no_command_is_an_error(monkeypatch):
    assert run_intern(monkeypatch) == EXIT_USER_ERROR


def test_nproc_is_taken_from_the_flags():
    assert intern.take_nproc(["--bf16", "--nproc=2", "--load", "x"]) == ("2", ["--bf16", "--load", "x"])
    assert intern.take_nproc(["--nproc_per_node", "4"]) == ("4", [])
    assert intern.take_nproc(["--nprocs", "4"]) == (None, ["--nprocs", "4"])


def test_launches_modules():
    module = ("ascendspeed.commands.train", "--bf16")
    plan = LaunchPlan.from_environment({"NPROC": "2"}, module)
    assert plan.command[-5:] == ("--num_accelerators", "2", "--module", *module)
    nodes = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "NPROC": "2"}
    assert LaunchPlan.from_environment(nodes, module).command[-4:] == ("--module", "--", *module)
    alone = LaunchPlan.from_environment({"NPROC": "1"}, module, quiet=True)
    assert alone.command == ("python", "-m", *module)
    assert "--module" not in LaunchPlan.from_environment(nodes, ("train.py",)).command


@pytest.mark.parametrize(
    ("environment", "nproc", "launched"),
    [
        ({}, None, False),
        ({}, "1", False),
        ({}, "2", True),
        ({"RESTARTS": "2"}, "1", True),
        ({"NPROC": "4"}, None, True),
        ({"HOSTFILE": "hosts"}, None, True),
        ({"NPROC": "4", "WORLD_SIZE": "4"}, None, False),  # a launcher has started this process
    ],
)
def test_starts_a_launcher(monkeypatch, environment, nproc, launched):
    for name in (*intern.LAUNCH_VARIABLES, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(intern, "_launch", lambda command, words, nproc: calls.append(nproc) or 0)
    monkeypatch.setattr("ascendspeed.commands.train.run_command", lambda: calls.append(sys.argv))
    words = [*(["--nproc", nproc] if nproc else []), "--bf16"]
    run_intern(monkeypatch, "train", *words)
    assert calls == ([nproc] if launched else [["intern train", "--bf16"]])


@pytest.fixture(scope="module")
def bash_completion() -> str:
    return intern.completion("bash")


def test_completion_knows_flags_and_values(bash_completion):
    script = bash_completion
    for command in intern.available():
        assert command.name in script
    assert "--tensor-model-parallel-size" in script
    assert "hf-llama" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def candidates(script: str, *words: str) -> list[str]:
    """Words that bash offers for the last one of a command line."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _tyro_intern; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash"], input=f"{script}\n{ask}", text=True, capture_output=True, check=True)
    return done.stdout.split()


def test_completion_offers_flags_and_not_their_help(bash_completion):
    assert {"hf", "hf-llama"} == set(candidates(bash_completion, "intern", "convert", "--format", "h"))
    flags = candidates(bash_completion, "intern", "train", "--")
    assert len(flags) > 100
    assert all(re.fullmatch(r"--[\w-]+", flag) for flag in flags)


@pytest.mark.slow
def test_completion_of_every_shell():
    for shell in intern.SHELLS:
        assert "COMPLETION_SPEC" in intern.completion(shell)


@pytest.mark.slow
def test_trains_on_two_processes(tmp_path):
    """`intern train --nproc 2`: the launcher, the module, and the log of both ranks."""
    words = ["train", "--nproc", "2", "--deepspeed", "--zero-stage", "1", *tiny_run.flags(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "ascendspeed.commands.intern", *words],
        env=launch.environment(MASTER_PORT=str(launch.free_port())),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = (tmp_path / "logs" / "train.log").read_text()
    assert "2 processes: TP 1 x DP 2" in log
    assert "intern train --nproc 2" in log
