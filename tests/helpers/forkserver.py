"""Fast child processes: forked from a server with torch, Megatron-core, DeepSpeed and transformers imported.

A fresh interpreter spends several seconds of CPU time on these imports, and a test of eight ranks pays them
eight times. A forked child is a separate process with its own environment, working directory and files.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["helpers.preloaded"])
SERVER_VARIABLES = (
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTHONWARNINGS",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
)
"""Variables that act on import: the server, which starts with the first child, takes them from that child."""


def start(target: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> BaseProcess:
    """Calls `target` in a forked process that has exactly this environment."""
    before = {name: os.environ.get(name) for name in SERVER_VARIABLES}
    os.environ.update({name: environment[name] for name in SERVER_VARIABLES if name in environment})
    process = SERVER.Process(target=_call, args=(target, arguments, environment))
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return process


def start_script(
    script: Path,
    arguments: list[str],
    environment: dict[str, str],
    log: Path,
    folder: Path,
    errors: Path | None = None,
    stdin: Path | None = None,
) -> BaseProcess:
    """Runs a script as `__main__` in a forked process; stdout goes to `log`, stderr to `errors` or there too.

    `folder`: the working directory. `stdin`: a file; None: empty.
    """
    streams = (str(log), str(errors or log), str(stdin or os.devnull))
    return start(run_script, (str(script), arguments, str(folder), *streams), environment)


def start_interpreter(
    script: Path, arguments: list[str], environment: dict[str, str], log: Path, folder: Path
) -> BaseProcess:
    """`start_script` in a fresh interpreter, for a device other than the CPU."""
    words = (run_script, (str(script), arguments, str(folder), str(log), str(log), os.devnull), environment)
    process = multiprocessing.get_context("spawn").Process(target=_call, args=words)
    process.start()
    return process


def run_script(script: str, arguments: list[str], folder: str, log: str, errors: str, stdin: str) -> None:
    """Runs a script in this process, which is a child of a test."""
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has put another in its place
    for number, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _call(target: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)
