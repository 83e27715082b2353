"""Benchmark of conversion against a copy of the same bytes: GB/s and peak anonymous memory, in rounds.

Every task runs in a process of its own, writes to the same disk, and ends with the data on it
(fsync). Time starts after the imports. Memory is sampled from /proc while the work runs. The source of a
model that does not fit twice into memory is dropped from the page cache before each task, so that every task
reads it from the disk; that of a small one is read into the page cache.

    python benchmarks/convert.py --rounds 5 --out benchmarks/results/convert-cpu.md
    python benchmarks/convert.py --model internlm-7b --rounds 3 --out benchmarks/results/convert-7b-cpu.md

The second command needs 60 GB of disk.
"""

import math
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from ascendspeed.cli import parser
from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import families
from ascendspeed.utils import errors

GB = 1e9
RANKS = (1, 8)
SHARD = ("5GB", "500MB")
"""Shard size of a model chosen by name, and of the small one."""


@dataclass(frozen=True)
class Options:
    """Compares conversion with a copy of the same bytes."""

    rounds: int = 5
    """Rounds; each does every piece of work once."""
    model: str | None = None
    """Architecture of the random bf16 model, by name; None: 6 layers of hidden size 2048, 0.87 GB."""
    work_dir: str | None = None
    """Folder on the disk to measure; None: the system's temporary one."""
    out: Annotated[str | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


@dataclass(frozen=True)
class ConversionTiming:
    """One piece of work."""

    seconds: float
    written: int
    """Bytes."""
    cpu: float
    """Seconds of all threads, user and system."""
    read: int
    """Bytes that came from the disk."""
    anonymous: int
    """Peak bytes above those before the work."""


def architecture(name: str | None) -> ModelConfig:
    """Returns the architecture of the model to convert."""
    return families.preset(name) if name else ModelConfig("internlm", 6, 2048, 5504, 16, vocab_size=32000)


def generate(folder: Path, model: str | None) -> None:
    """Writes a random model in bf16 as a Hugging Face directory."""
    import torch

    from ascendspeed.conversion import convert
    from ascendspeed.conversion.checkpoint_reader import from_factory
    from ascendspeed.models import param_mapping

    config = architecture(model)
    parameters = {p.name: p for p in param_mapping.parameters(config)}
    noise = torch.randn(1 << 24, dtype=torch.bfloat16)  # the same for all: drawing 15 GB would take minutes
    source = convert.CheckpointReader(
        "random",
        folder,
        config,
        {},
        dict.fromkeys(parameters, torch.bfloat16),
        from_factory(
            lambda name: noise.repeat(-(-(n := math.prod(parameters[name].shape)) // len(noise)))[:n].view(
                parameters[name].shape
            )
        ),
        None,
    )
    convert.write_hf(source, folder, max_shard_size=SHARD[model is None])


def copy(source: Path, target: Path) -> None:
    """Copies like `cp -r` and flushes to the disk."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def split(source: Path, target: Path, tp: int) -> None:
    """Converts Hugging Face to rank files."""
    from ascendspeed.conversion import convert

    convert.write_megatron(convert.open_reader(source), target, tp)


def merge(source: Path, target: Path, shard: str) -> None:
    """Converts rank files back to Hugging Face."""
    from ascendspeed.conversion import convert

    convert.write_hf(convert.open_reader(source), target, max_shard_size=shard)


def set_page_cache(source: Path) -> None:
    """Gives every task the same start: nothing of a large source in the page cache, or all of a small one."""
    files = [path for path in source.rglob("*") if path.is_file()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    is_small = 2 * sum(path.stat().st_size for path in files) < memory
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        if is_small:
            while os.read(descriptor, 1 << 24):
                pass
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def _bytes_read() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def measure(work: Callable[[Path, Path], None], source: Path, target: Path) -> ConversionTiming:
    """Runs in a fresh process."""
    from ascendspeed.conversion import convert  # noqa: F401

    set_page_cache(source)
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    read, cpu, start = _bytes_read(), time.process_time(), time.perf_counter()
    work(source, target)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    return ConversionTiming(
        seconds,
        sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        cpu,
        _bytes_read() - read,
        max(0, peak - before),
    )


def run(options: Options, folder: Path) -> dict[str, list[ConversionTiming]]:
    """Every piece of work in every round; the targets of a round are removed after it."""
    fresh = multiprocessing.get_context("spawn")

    def alone(function: Callable, *args: object) -> ConversionTiming:
        with fresh.Pool(1) as pool:
            return pool.apply(function, args)

    hf, shard = folder / "hf", SHARD[options.model is None]
    alone(generate, hf, options.model)
    jobs = {"copy": (copy, hf)}
    for tp in RANKS:
        alone(split, hf, folder / f"ranks-{tp}", tp)
        jobs[f"Hugging Face → Megatron TP {tp}"] = (partial(split, tp=tp), hf)
        jobs[f"Megatron TP {tp} → Hugging Face"] = (partial(merge, shard=shard), folder / f"ranks-{tp}")
    results: dict[str, list[ConversionTiming]] = {name: [] for name in jobs}
    for number in range(options.rounds):
        for name, (work, source) in jobs.items():
            results[name].append(alone(measure, work, source, folder / "out"))
            shutil.rmtree(folder / "out")
            print(f"round {number + 1} of {options.rounds}: {name}: {results[name][-1]}", flush=True)
    return results


def report(results: dict[str, list[ConversionTiming]], options: Options) -> str:
    """A markdown table of medians; ratios are medians of the rounds' own."""
    size = results["copy"][0].written / GB
    lines = [
        "# Conversion against a plain copy",
        "",
        f"{time.strftime('%Y-%m-%d')}, {_cpu()}, {os.cpu_count()} cores, {platform.system()} "
        f"{platform.release()}, "
        f"Python {platform.python_version()}, torch {version('torch')}, safetensors "
        f"{version('safetensors')}. "
        f"Load average at the end: {os.getloadavg()[1]:.1f} (5 minutes), so other work ran beside where it "
        f"is above 1.",
        "",
        f"{options.model or 'A model of 6 layers, hidden size 2048,'} with random weights in bf16: "
        f"{size:.2f} GB in shards of "
        f"{SHARD[options.model is None]}. Medians of {options.rounds} interleaved rounds, each piece of "
        f"work in a fresh process, "
        f"fsync included. The machine has "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GB:.0f} GB of memory.",
        "",
        "| work | s (min to max) | GB/s | time / copy | CPU s | read from the disk | peak anonymous memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        seconds = [r.seconds for r in runs]
        middle = statistics.median(seconds)
        ratio = statistics.median(r.seconds / c.seconds for r, c in zip(runs, results["copy"], strict=True))
        memory = max(r.anonymous for r in runs) / 1e6
        rate = runs[0].written / GB / middle
        cpu = statistics.median(r.cpu for r in runs)
        read = statistics.median(r.read for r in runs) / GB
        lines.append(
            f"| {name} | {middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {rate:.2f} | {ratio:.2f} "
            f"| {cpu:.2f} | {read:.2f} GB | {memory:.0f} MB |"
        )
    config = architecture(options.model)
    largest = config.vocab_size * config.hidden_size * 2 / 1e6
    lines += [
        "",
        f"The largest tensor has {largest:.0f} MB. Memory is what the work adds to an idle process with its "
        f"imports done.",
    ]
    return "\n".join(lines) + "\n"


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        return next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine()
        )


def main() -> None:
    """Measures, prints, writes."""
    options = parser.parse(Options, description=__doc__ or "")
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        text = report(run(options, Path(folder)), options)
    print(text)
    if options.out:
        Path(options.out).write_text(text)


if __name__ == "__main__":
    errors.run(main)
