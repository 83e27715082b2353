"""Kills training repeatedly by a seeded schedule and compares its curve with that of an uninterrupted run.

    python benchmarks/faults.py --kills 10 --out benchmarks/results/faults.md

Every start is a real launcher (DeepSpeed's or torchrun, at random) with two ranks of a real engine (one of
LAYOUTS). A rank gets SIGKILL from outside: half of the kills are aimed at the time of a save, the others at
any moment from the start of the program on. Whether a kill was inside a save is seen afterwards: that start
left a step's folder under its temporary name. The run is restarted with --auto-resume until it ends; then
loss and gradient norm of every iteration of all starts must equal those of the uninterrupted run, in
hexadecimal. The records are appended to OUT with the ending .jsonl, and the table is made from all records
there.
"""

import contextlib
import datetime
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from ascendspeed.cli import parser
from ascendspeed.utils import errors

ROOT = Path(__file__).resolve().parent.parent
ITERS, EVERY = 40, 2
"""Iterations of a run, and between its checkpoints."""
AHEAD = 10
"""Most iterations between the first one of a start and a kill."""
WINDOW = 0.06
"""Seconds: about the duration of a save here."""
LAYOUTS = {
    "ZeRO-2": "--deepspeed --zero-stage 2",
    "Megatron's, PP2 x VPP2": "--pp 2 --num-layers-per-virtual-pipeline-stage 1",
    "Megatron's, shards, overlap": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}
"""Layouts of the two ranks."""
TRAINING = f"""--model internlm-tiny --seq-length 64 --micro-batch-size 1 --global-batch-size 4
    --train-iters {ITERS} --save-interval {EVERY} --keep 3 --hidden-dropout 0.1
    --auto-resume --device cpu""".split()


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    kills: int = 10
    """Kills to add; the last run is still brought to its end."""
    seed: int = 0
    """Seed of the schedule; records of another seed are added to the same file."""
    work: str = ".faults"
    """Folder for data and runs; existing data are reused."""
    out: Annotated[str | None, parser.output_flag("out")] = None
    """Markdown file for the table, with the records beside it; None: print only."""
    timeout_minutes: float = 0.5
    """The runs' --distributed-timeout-minutes."""


@dataclass(frozen=True)
class Kill:
    """One kill and its outcome."""

    seed: int
    launcher: str
    rank: int
    aimed_at_save: bool
    behind: bool
    """True with --async-save."""
    inside: bool
    """True if a save was in progress."""
    iteration: int
    """Iterations that the run had done before."""
    named: bool
    """True if the other rank named the lost one."""
    code: int
    """Exit code of the launcher."""
    seconds: float
    """Seconds from the kill to the end of the launcher."""
    layout: str = "ZeRO-2"
    """Key of LAYOUTS; the oldest records lack it."""
    same: bool | None = None
    """True if the whole curve of the run equals that of the uninterrupted one, in hexadecimal."""


@dataclass
class TrainingRun:
    """One run and its folder."""

    folder: Path
    data: Path
    options: Options
    layout: str
    behind: bool = False

    def start(self, launcher: str) -> subprocess.Popen:
        """Starts the launcher, with its output in folder/said."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        start = {
            "deepspeed": [
                "-m",
                "deepspeed.launcher.runner",
                "--no_local_rank",
                "--num_accelerators",
                "2",
                "--master_port",
                port,
            ],
            "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--"],
        }[launcher]
        words = [
            *LAYOUTS[self.layout].split(),
            *TRAINING,
            "--data-path",
            str(self.data / "alpaca_text_document"),
        ]
        words += ["--save", str(self.folder / "ckpt"), "--log-dir", str(self.folder / "log")]
        words += ["--distributed-timeout-minutes", str(self.options.timeout_minutes)]
        words += ["--async-save"] if self.behind else []
        quiet = {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONUNBUFFERED": "1",
            "FAULT_DIR": str(self.folder),
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | quiet | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PATH": path}
        with open(self.folder / "said", "a") as said:
            command = [sys.executable, *start, str(ROOT / "tests/helpers/fault_worker.py"), *words]
            return subprocess.Popen(
                command,
                env=env,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )

    def end(self, launcher: subprocess.Popen) -> None:
        """Waits for the end of a start without a kill."""
        if code := launcher.wait():
            raise RuntimeError(
                f"untouched, it ended with code {code}: {(self.folder / 'said').read_text()[-3000:]}"
            )

    def curve(self) -> list[str]:
        """Returns a line for every iteration done, of all starts."""
        path = self.folder / "curve"
        return path.read_text().splitlines() if path.exists() else []

    def unfinished(self) -> set[tuple[str, int]]:
        """Returns name and modification time of checkpoints whose save is in progress or was interrupted."""
        found = set()
        for path in (self.folder / "ckpt").glob(".step_*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # its save ended in the meantime
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def ranks(self) -> dict[int, int]:
        """Returns rank -> process id of the running ranks."""
        found, mine = {}, f"FAULT_DIR={self.folder}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # another user's process, or ended
                continue
            rank = next((word[5:] for word in words if word.startswith(b"RANK=")), None)
            if rank is not None and mine in words:
                found[int(rank)] = int(entry.name)
        return found


def until(happened: Callable[[], bool], launcher: subprocess.Popen, pause: float = 0.002) -> bool:
    """Waits until `happened()`; returns False if the launcher ended first."""
    while not happened():
        if launcher.poll() is not None:
            return False
        time.sleep(pause)
    return True


def kill(run: TrainingRun, dice: random.Random) -> Kill | None:
    """Does one start with one kill; returns None if the run ended before."""
    plan = {
        "seed": run.options.seed,
        "launcher": dice.choice(["deepspeed", "torchrun"]),
        "rank": dice.randrange(2),
    }
    at_save, early, ahead, within = (
        dice.random() < 0.5,
        dice.random() < 0.2,
        dice.randrange(AHEAD),
        dice.random(),
    )
    run.behind = dice.random() < 0.5
    already, left = len(run.curve()), run.unfinished()
    launcher = run.start(plan["launcher"])
    alive = until(lambda: len(run.ranks()) == 2, launcher, 0.05)
    if alive and early and not at_save:
        time.sleep(within * 8)  # during imports, building, verifying or loading
    elif alive:
        alive = until(lambda: len(run.curve()) >= already + 1 + ahead, launcher)
        if alive and at_save:
            alive = until(lambda: bool(run.unfinished() - left), launcher, 0.0005)
        time.sleep(within * WINDOW)
    victim = run.ranks().get(plan["rank"])
    if not alive or victim is None or launcher.poll() is not None:
        run.end(launcher)
        return None
    done, began = len(run.curve()), time.monotonic()
    os.kill(victim, signal.SIGKILL)
    try:
        code = launcher.wait(timeout=180)
    except subprocess.TimeoutExpired:
        for process in (launcher.pid, *run.ranks().values()):
            os.kill(process, signal.SIGKILL)
        raise RuntimeError(f"{run.folder}: the launcher did not end in 180 s after a kill") from None
    said = (run.folder / "said").read_text()
    return Kill(
        **plan,
        layout=run.layout,
        aimed_at_save=at_save,
        behind=run.behind,
        inside=bool(run.unfinished() - left),  # leftovers of the previous kill do not count
        iteration=done,
        named=f"rank {plan['rank']} gave no sign of life" in said,
        code=code,
        seconds=time.monotonic() - began,
    )


def one_run(run: TrainingRun, reference: dict[str, str], dice: random.Random, most: int) -> list[Kill]:
    """Runs training to its end, with at most `most` kills, and compares the curve of all its starts."""
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    kills: list[Kill] = []
    finished = re.compile(rf"^{ITERS} ", re.MULTILINE)
    while not finished.search("\n".join(run.curve())) or run.unfinished():
        if len(kills) < most:
            if found := kill(run, dice):
                kills.append(found)
                (run.folder / "said").rename(run.folder / f"said.{len(kills)}")
                print(f"kill {len(kills)} of this run: {found}", flush=True)
        else:
            run.end(run.start("deepspeed"))
    wrong = [line for line in run.curve() if reference.get(line.split()[0]) != line]
    same = not wrong and {line.split()[0] for line in run.curve()} == set(reference)
    if not same:
        kept = run.folder.rename(f"{run.folder}-{time.time_ns()}")
        print(f"{kept}: {len(wrong)} iterations differ, first {wrong[:1]}", flush=True)
    return [Kill(**asdict(one) | {"same": same}) for one in kills]


def untouched(run: TrainingRun) -> dict[str, str]:
    """Returns iteration -> line of an uninterrupted run; both launchers must give the same."""
    curves = []
    for launcher in ("deepspeed", "torchrun"):
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        run.end(run.start(launcher))
        curves.append({line.split()[0]: line for line in run.curve()})
    if curves[0] != curves[1] or len(curves[0]) != ITERS:
        raise RuntimeError("two untouched runs have different curves; nothing can be compared with them")
    return curves[0]


def table(records: list[dict]) -> str:
    """Formats the report of all records."""
    seeds = sorted({one["seed"] for one in records})
    rows = []
    for name, chosen in (
        ("all", records),
        ("inside a save", [one for one in records if one["inside"]]),
        ("outside", [one for one in records if not one["inside"]]),
        ("inside, saving behind the step", [one for one in records if one["inside"] and one["behind"]]),
        ("DeepSpeed's launcher", [one for one in records if one["launcher"] == "deepspeed"]),
        ("torchrun", [one for one in records if one["launcher"] == "torchrun"]),
        *((layout, [one for one in records if one["layout"] == layout]) for layout in LAYOUTS),
        ("rank 0", [one for one in records if one["rank"] == 0]),
        ("rank 1", [one for one in records if one["rank"] == 1]),
    ):
        if chosen:
            same, named = sum(bool(one["same"]) for one in chosen), sum(one["named"] for one in chosen)
            seconds = sorted(one["seconds"] for one in chosen)
            rows.append(
                f"| {name} | {len(chosen)} | {same} | {named} | {seconds[len(seconds) // 2]:.1f} | "
                f"{seconds[-1]:.1f} |"
            )
    share = sum(one["inside"] for one in records) / max(1, len(records))
    return f"""# Killed again and again

`python benchmarks/faults.py`, seeds {", ".join(map(str, seeds))}; {datetime.date.today()},
{os.cpu_count()} cores of {device_name()}, shared with other work. Two ranks train a tiny InternLM with
dropout; {ITERS} iterations, a checkpoint every {EVERY}. {len(records)} kills by SIGKILL,
{share:.0%} of them during a save.
A rank that is killed before the ranks have joined is not named: the launcher ends the others at once.

| kills | number | curve bit-identical | lost rank named | seconds to the end, median | longest |
|---|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
"""


def device_name() -> str:
    """Returns the name of the processor."""
    with open("/proc/cpuinfo") as lines:
        return next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )


def main() -> int:
    """Makes data, runs, kills and the table; returns 1 if a curve differs."""
    options = parser.parse(Options, description=__doc__ or "")
    work, records = (
        Path(options.work).resolve(),
        Path(options.out).with_suffix(".jsonl") if options.out else None,
    )
    data = work / "data"
    if not (work / "alpaca_text_document.idx").exists():

        def run(*words: object) -> None:
            command = [sys.executable, *map(str, words)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

        run("examples/intern/make_quickstart_data.py", "--output-dir", data, "--rows", 400)
        run(
            *(
                "tools/preprocess_data.py",
                "--input",
                data / "train.parquet",
                "--tokenizer-name-or-path",
                data / "tokenizer",
            ),
            *(
                "--output-prefix",
                work / "alpaca",
                "--handler-name",
                "AlpacaPretrainHandler",
                "--append-eod",
                "--workers",
                1,
            ),
        )
    dice, kills = random.Random(options.seed), []
    references: dict[str, dict[str, str]] = {}
    while len(kills) < options.kills:
        layout = dice.choice(list(LAYOUTS))
        if layout not in references:
            references[layout] = untouched(TrainingRun(work / "untouched", work, options, layout))
        found = one_run(
            TrainingRun(work / "run", work, options, layout),
            references[layout],
            dice,
            options.kills - len(kills),
        )
        kills += found
        if records:
            with open(records, "a") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in found)
    if records:
        kills = [Kill(**json.loads(line)) for line in records.read_text().splitlines()]
    every = [asdict(one) for one in kills]
    if options.out:
        Path(options.out).write_text(table(every))
    print(table(every))
    return 0 if all(one["same"] for one in every) else 1


if __name__ == "__main__":
    errors.run(main)
