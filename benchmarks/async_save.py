"""Measures the time that training loses for a checkpoint, with and without --async-save, and the cost of the
stop decision.

    python benchmarks/async_save.py --out benchmarks/results/async-save.md

Two ranks of ZeRO-2 train the same small model in turns with and without --async-save; all numbers are read
from the runs' own logs. Iterations during the writing of a checkpoint share the machine with it: they are
compared with the others.
"""

import datetime
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from ascendspeed.cli import parser
from ascendspeed.training import metric_lines
from ascendspeed.utils import errors

ROOT = Path(__file__).resolve().parent.parent
SAVED = re.compile(
    r"^ saved \S+ in ([\d.]+) s(?:, of which training stood still for ([\d.]+) s)?$", re.MULTILINE
)


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    layers: int = 8
    """Layers of a model of width 512 with 24,064 tokens: 8 give 50 million parameters, a checkpoint of 0.56
    GiB.
    """
    iters: int = 12
    """Iterations of a run."""
    every: int = 4
    """Iterations between checkpoints."""
    rounds: int = 2
    """Runs of each kind, in turns."""
    work: str = ".async_save"
    """Folder for data and checkpoints; its disk is measured."""
    out: Annotated[str | None, parser.output_flag("out")] = None
    """Markdown file for the table; None: print only."""


@dataclass
class RunTimings:
    """Times of one run."""

    seconds: list[float]
    """Seconds from the start of each save to the complete checkpoint."""
    stalls: list[float]
    calm: list[float]
    """Milliseconds of iterations without a save in progress."""
    busy: list[float]
    """Milliseconds of the iterations after the start of a save."""


def data(work: Path) -> Path:
    """Returns the prefix of a small data set, which is created if missing."""
    prefix = work / "alpaca_text_document"
    if not prefix.with_suffix(".idx").exists():
        make = [
            "examples/intern/make_quickstart_data.py",
            "--output-dir",
            str(work / "data"),
            "--rows",
            "400",
        ]
        read = [
            "tools/preprocess_data.py",
            "--input",
            str(work / "data/train.parquet"),
            "--output-prefix",
            str(work / "alpaca"),
        ]
        read += [
            "--tokenizer-name-or-path",
            str(work / "data/tokenizer"),
            "--handler-name",
            "AlpacaPretrainHandler",
        ]
        for words in (make, [*read, "--append-eod", "--workers", "1"]):
            subprocess.run([sys.executable, *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return prefix


def free_port() -> str:
    """Returns a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def train(options: Options, work: Path, behind: bool) -> RunTimings:
    """Runs training once, under torchrun."""
    shutil.rmtree(work / "run", ignore_errors=True)
    words = f"""-m torch.distributed.run --nproc-per-node 2 --master-port {free_port()} --
        {ROOT}/pretrain_intern.py --deepspeed --zero-stage 2 --device cpu --model internlm-7b
        --num-layers {options.layers} --hidden-size 512 --ffn-hidden-size 1376 --num-attention-heads 8
        --vocab-size 24064 --seq-length 128 --micro-batch-size 1 --global-batch-size 4
        --train-iters {options.iters} --save-interval {options.every} --keep 1 --data-path {data(work)}
        --save {work}/run/ckpt --log-dir {work}/run/log""".split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [sys.executable, *words, *(["--async-save"] if behind else [])],
        env=env,
        check=True,
        capture_output=True,
        cwd=work,
    )
    path = work / "run/log/train.log"
    saves = [(float(a), float(b or a)) for a, b in SAVED.findall(path.read_text())]
    lines = [
        line
        for line in metric_lines.read_lines(path)
        if isinstance(line, metric_lines.TrainLine) and line.iteration > 1
    ]  # the first iteration warms up
    calm, busy = [], []
    for line in lines:
        follows = (line.iteration - 1) % options.every == 0
        (busy if follows else calm).append(line.ms_per_iteration)
    return RunTimings(
        [a for a, _ in saves[:-1]], [b for _, b in saves[:-1]], calm, busy
    )  # the run waits for the last save, so it is left out


def decide_to_stop(rank: int, port: str, calls: int, out: Any) -> None:
    """Runs one of two ranks that only decide whether to stop."""
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update(place)
    from ascendspeed.distributed import device

    here = device.prepare("cpu")
    from ascendspeed.config.schema import ParallelConfig
    from ascendspeed.distributed import process_groups
    from ascendspeed.training.fault_tolerance import StopCoordinator

    grid = process_groups.initialize(here, ParallelConfig(), 1)
    stop, took = StopCoordinator(grid, process_groups.new_cpu_group(1)), []
    for _ in range(calls):
        began = time.perf_counter()
        stop.reason()
        took.append(time.perf_counter() - began)
    if rank == 0:
        out.put(statistics.median(took))
    grid.barrier()
    process_groups.destroy()


def measure_stop_decision() -> float:
    """Returns the median seconds per decision."""
    context, port = get_context("spawn"), free_port()
    out = context.Queue()
    ranks = [context.Process(target=decide_to_stop, args=(rank, port, 2000, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    seconds = out.get(timeout=300)
    for process in ranks:
        process.join()
    return seconds


def table(options: Options, kinds: dict[str, list[RunTimings]], question: float) -> str:
    """Formats the report."""
    rows = []
    for name, runs in kinds.items():
        numbers = [
            statistics.median(x for run in runs for x in getattr(run, field))
            for field in ("seconds", "stalls", "calm", "busy")
        ]
        worst = max(x for run in runs for x in run.stalls)
        rows.append(
            f"| {name} | {numbers[0]:.1f} s | {numbers[1]:.2f} s | {worst:.2f} s | {numbers[2]:.0f} ms | "
            f"{numbers[3]:.0f} ms |"
        )
    step = statistics.median(x for run in kinds["at once"] for x in run.calm)
    with open("/proc/cpuinfo") as lines:
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
    command = (
        f"--layers {options.layers} --iters {options.iters} --every {options.every} --rounds {options.rounds}"
    )
    return f"""# Time that training is blocked by a checkpoint

`python benchmarks/async_save.py {command}`; {datetime.date.today()}, {os.cpu_count()} cores of
{name}, shared with other work. Two ranks of ZeRO-2; medians, without first iterations and last checkpoints.

| saved | until complete | training blocked | at most | iteration without a save | iteration after its start |
|---|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

The common decision to stop (a signal, the time limit, a failed save) took {question * 1e6:.0f} µs
per iteration between two ranks, {question / (step / 1e3):.3%} of an iteration here.
"""


def main() -> None:
    """Runs both kinds in turns, measures the stop decision, and writes the table."""
    options = parser.parse(Options, description=__doc__ or "")
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, list[RunTimings]] = {"at once": [], "behind the step": []}
    for _ in range(options.rounds):
        for name, runs in kinds.items():
            runs.append(train(options, work, name != "at once"))
            print(f"{name}: {runs[-1]}", flush=True)
    report = table(options, kinds, measure_stop_decision())
    if options.out:
        Path(options.out).write_text(report)
    print(report)


if __name__ == "__main__":
    errors.run(main)
