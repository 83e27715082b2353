"""Jobs of a toy on real ranks over gloo, started as often as a test likes."""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ascendspeed.checkpoint.discovery import find_checkpoint
from ascendspeed.utils import errors
from helpers import forkserver, launch

ITERS, WORLD = 12, 2


def rank(number: int, world: int, port: int, folder: str, flags: list[str], env: dict[str, str]) -> None:
    """The whole life of one rank; in a process of its own."""
    log = os.open(f"{folder}/rank{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    environment = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update(
        {k: str(v) for k, v in environment.items()} | {"FAULT_ENGINE": "toy", "FAULT_DIR": folder} | env
    )
    if "RANK_FOLDERS" in env:
        (own := Path(folder, str(number))).mkdir(exist_ok=True)
        os.chdir(own)
    from helpers import fault_worker

    sys.argv = ["fault_worker.py", *flags]
    errors.LAUNCHER_GRACE_SECONDS = 0.5  # no launcher to wait for
    errors.run(fault_worker.main)


@dataclass
class Job:
    """A run of the toy, started as often as a test likes; --save is folder/ckpt."""

    folder: Path
    flags: tuple[str, ...] = ()
    faults: list[dict] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    world: int = WORLD
    port: int | None = None

    def start(self, *more: str) -> list:
        """The processes."""
        words = f"--global-batch-size 4 --micro-batch-size 1 --train-iters {ITERS} --save-interval 3".split()
        words.append("--auto-resume")
        words += [
            "--save",
            str(self.folder / "ckpt"),
            "--log-dir",
            str(self.folder / "log"),
            *self.flags,
            *more,
        ]
        env, port = {"FAULTS": json.dumps(self.faults)} | self.env, self.port or launch.free_port()
        self.folder.mkdir(exist_ok=True)
        return [
            forkserver.start(rank, (r, self.world, port, str(self.folder), words, env), launch.environment())
            for r in range(self.world)
        ]

    def run(self, *more: str) -> list[int]:
        """Exit codes. Ranks that do not end are killed, and the test fails."""
        return ended(self.start(*more), self)

    def said(self) -> str:
        """Output of all ranks, over all starts."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("rank*.log")))

    def curve(self) -> dict[int, str]:
        """Iteration -> loss and gradient norm in hexadecimal; repeated iterations must be equal."""
        curve: dict[int, str] = {}
        for line in (self.folder / "curve").read_text().splitlines():
            iteration, _, numbers = line.partition(" ")
            assert curve.setdefault(int(iteration), numbers) == numbers, f"iteration {iteration} differs"
        return curve

    def steps(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "ckpt").glob("step_*"))

    def good(self) -> int:
        """The step that would be resumed."""
        return find_checkpoint(self.folder / "ckpt").state.step


def ended(ranks: list, job: Job, seconds: float = 60) -> list[int]:
    until = time.monotonic() + seconds
    [process.join(max(0, until - time.monotonic())) for process in ranks]
    codes = [process.exitcode for process in ranks]
    [process.kill() for process in ranks]
    assert None not in codes, f"{codes}\n{job.said()[-3000:]}"
    return codes
