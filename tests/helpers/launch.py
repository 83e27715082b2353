"""Starts real processes for a test: several ranks over gloo, one thread each, results as JSON."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """Of a child process: one thread (two cores are shared by several ranks), quiet, offline, a rank of nothing yet."""
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


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(world: int, script: str, job: dict[str, Any], folder: Path, timeout: float = 300) -> Any:
    """Runs tests/helpers/`script` on `world` ranks with `job` as its JSON input; returns what rank 0 wrote to job["out"].

    Raises AssertionError with every rank's last lines when one fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {**job, "out": str(folder / "out.json")}
    (folder / "job.json").write_text(json.dumps(job))
    port = str(free_port())
    processes, logs = [], []
    for rank in range(world):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place)
        logs.append(folder / f"rank{rank}.log")
        with open(logs[-1], "w") as log:
            command = [sys.executable, str(ROOT / "tests" / "helpers" / script), str(folder / "job.json")]
            processes.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
            )
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert not any(codes), f"exit codes {codes}\n{said}"
    return json.loads((folder / "out.json").read_text())
