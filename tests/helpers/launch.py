"""Starts real processes for a test: several ranks over gloo, one thread each, results as JSON."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import forkserver

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """Environment of a child process: one thread (ranks share two cores), quiet, offline, no rank set."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    own = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**own, **quiet, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **extra}


PORTS = itertools.count(os.getpid() * 37)
"""Next port to try; parallel test processes begin at different numbers."""


def free_port() -> int:
    """A free TCP port, below the range from which the kernel assigns ports to outgoing connections."""
    for number in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := 10000 + number % 18000))
            return port
    raise AssertionError("unreachable: the counter does not end")


def script(path: str | Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs a Python script in the repository's root, in a process forked from the server.

    `path`: absolute or relative to the root.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, name) for name in ("stdout", "stderr")]
        words = [str(word) for word in arguments]
        process = forkserver.start_script(ROOT / path, words, environment(), logs[0], ROOT, logs[1])
        process.join(timeout)
        process.kill()
        output, errors = (log.read_text() if log.exists() else "" for log in logs)
    return subprocess.CompletedProcess([str(path), *words], process.exitcode, output, errors)


def must(path: str | Path, *arguments: object, timeout: float = 300) -> str:
    """Returns the stdout of `script`, which has to succeed."""
    done = script(path, *arguments, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def ranks(world: int, worker: str, job: dict[str, Any], folder: Path, timeout: float = 300) -> Any:
    """Runs tests/helpers/`worker` on `world` ranks with `job` as its JSON input; returns rank 0's job["out"].

    Raises AssertionError with every rank's last lines when one fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {**job, "out": str(folder / "out.json")}
    (folder / "job.json").write_text(json.dumps(job))
    program = ROOT / "tests" / "helpers" / worker
    on_cpu = job.get("device", "cpu") in ("cpu", "npu")  # the stand-in of an NPU
    start = (
        forkserver.start_script if on_cpu else forkserver.start_interpreter
    )  # the server has torch prepared for the CPU
    run_ranks(world, start, program, [str(folder / "job.json")], folder, folder, timeout)
    return json.loads((folder / "out.json").read_text())


def forked(world: int, program: Path, words: list[str], logs: Path, timeout: float = 300) -> None:
    """Runs a script with these flags on `world` forked ranks, in the repository's root."""
    run_ranks(world, forkserver.start_script, program, words, logs, ROOT, timeout)


def run_ranks(
    world: int,
    start: Callable[..., Any],
    program: Path,
    words: list[str],
    folder: Path,
    directory: Path,
    timeout: float,
) -> None:
    """Starts `world` ranks that log to `folder` and work in `directory`; all must succeed."""
    port = str(free_port())
    processes, logs = [], []
    for rank in range(world):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        env = environment(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **{name: str(value) for name, value in variables.items()},
        )
        logs.append(folder / f"rank{rank}.log")
        logs[-1].unlink(missing_ok=True)
        processes.append(start(program, words, env, logs[-1], directory))
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    output = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert not any(code is None or code for code in codes), f"exit codes {codes}\n{output}"
