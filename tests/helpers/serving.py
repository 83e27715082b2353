"""Starts the HTTP service on real ranks, for tests."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers import forkserver, launch

START_SECONDS = 120


@dataclass
class RunningServer:
    """A service that takes requests."""

    url: str
    processes: list[BaseProcess]
    """One per rank."""
    errors: Path
    """Stderr of rank 0."""
    hold: Path
    """A file; while it exists, the engine begins no pass with sequences that have tokens already."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which no sequence ends: it gets its first token, and the others after the context."""
        self.hold.touch()
        try:
            yield
        finally:
            self.hold.unlink()

    def get(self, path: str, headers: dict[str, str] | None = None) -> str:
        """Body of a GET request."""
        request = urllib.request.Request(self.url + path, headers=headers or {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def metric(self, name: str, headers: dict[str, str] | None = None) -> float:
        """Value of a metric."""
        text = self.get("/metrics", headers)
        lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
        assert len(lines) == 1, (name, lines)
        return float(lines[0].split()[-1])


@contextmanager
def running_server(
    folder: Path, logs: Path, *flags: object, tp: int = 1, pp: int = 1
) -> Iterator[RunningServer]:
    """Serves the checkpoint `folder` on tp x pp ranks while the context is open."""
    logs.mkdir(parents=True, exist_ok=True)
    port, world = launch.free_port(), tp * pp
    words = ["--load", str(folder), "--device", "cpu", "--port", str(port), "--tp", str(tp), "--pp", str(pp)]
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(launch.free_port())
    processes = []
    for rank in range(world):
        env = launch.environment(**common, RANK=str(rank), LOCAL_RANK=str(rank))
        script = launch.ROOT / "tasks/inference/serve.py"
        log, errors = logs / f"stdout{rank}", logs / f"stderr{rank}"
        arguments = (
            str(script),
            [*words, *map(str, flags)],
            str(launch.ROOT),
            str(log),
            str(errors),
            os.devnull,
        )
        processes.append(forkserver.start(_serve, (str(logs / "hold"), *arguments), env))
    server = RunningServer(f"http://127.0.0.1:{port}", processes, logs / "stderr0", logs / "hold")
    try:
        _wait_until_ready(server)
        yield server
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(hold: str, *arguments: Any) -> None:
    """Runs the service in this process; its engine observes `RunningServer.hold`."""
    from ascendspeed.inference.serving.paged_engine import PagedEngine

    step = PagedEngine.step

    def step_unless_held(engine: PagedEngine) -> Any:
        while engine.scheduler.running and os.path.exists(hold):
            time.sleep(0.005)
        return step(engine)

    PagedEngine.step = step_unless_held  # type: ignore[method-assign]
    forkserver.run_script(*arguments)


def _wait_until_ready(server: RunningServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.processes[0].is_alive(), server.errors.read_text()
        try:
            server.get("/health")
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.05)
    raise AssertionError(server.errors.read_text())
