"""Conversion against a plain copy of the same bytes: GB/s and peak anonymous memory, in interleaved rounds.

Every piece of work runs in a process of its own, writes to the same disk, and ends with the data on it (fsync); the source is in
the page cache for all alike. Time starts after the imports. Memory is sampled from /proc while the work runs.

    python benchmarks/convert.py --rounds 5 --out benchmarks/results/convert-cpu.md
"""

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
from importlib.metadata import version
from pathlib import Path

from ascendspeed import errors, flags
from ascendspeed.config import ModelConfig

GB = 1e9


@dataclass(frozen=True)
class Options:
    """Conversion against a plain copy of the same bytes."""

    rounds: int = 5
    """Rounds; each does every piece of work once."""
    layers: int = 6
    """Layers of the generated bf16 model (hidden size 2048, 101 MB each, and 262 MB of embeddings)."""
    work_dir: str | None = None
    """Folder on the disk to measure; None: the system's temporary one."""
    out: str | None = None
    """Markdown file to write; None: print only."""


@dataclass(frozen=True)
class Result:
    """One piece of work."""

    seconds: float
    written: int
    """Bytes."""
    anonymous: int
    """Peak bytes above those before the work."""


def generate(folder: Path, layers: int) -> None:
    """A random InternLM in bf16 as a Hugging Face directory, 500 MB to a shard."""
    import torch

    from ascendspeed import convert, weights
    from ascendspeed.formats.source import from_maker

    config = ModelConfig("internlm", layers, 2048, 5504, 16, vocab_size=32000)
    parameters = {p.name: p for p in weights.parameters(config)}
    source = convert.Source(
        "random",
        folder,
        config,
        {},
        dict.fromkeys(parameters, torch.bfloat16),
        from_maker(lambda name: torch.randn(parameters[name].shape, dtype=torch.bfloat16)),
        None,
    )
    convert.write_hf(source, folder, max_shard_size="500MB")


def copy(source: Path, target: Path) -> None:
    """As `cp -r`, and waits for the disk."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def split(source: Path, target: Path) -> None:
    """Hugging Face to rank files for TP 2."""
    from ascendspeed import convert

    convert.write_megatron(convert.open_source(source), target, 2)


def merge(source: Path, target: Path) -> None:
    """Rank files back to Hugging Face."""
    from ascendspeed import convert

    convert.write_hf(convert.open_source(source), target, max_shard_size="500MB")


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def measure(work: Callable[[Path, Path], None], source: Path, target: Path) -> Result:
    """Runs in a fresh process."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ascendspeed import convert  # noqa: F401

    with FakeTensorMode():  # its first use imports for a second
        torch.empty(1)
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work(source, target)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return Result(seconds, sum(path.stat().st_size for path in target.rglob("*") if path.is_file()), max(0, peak - before))


def run(options: Options, folder: Path) -> dict[str, list[Result]]:
    """Every piece of work in every round; the targets of a round are removed after it."""
    fresh = multiprocessing.get_context("spawn")

    def alone(function: Callable, *args: object) -> Result:
        with fresh.Pool(1) as pool:
            return pool.apply(function, args)

    alone(generate, folder / "hf", options.layers)
    alone(split, folder / "hf", folder / "ranks")
    jobs = {
        "copy": (copy, folder / "hf"),
        "Hugging Face → Megatron TP 2": (split, folder / "hf"),
        "Megatron TP 2 → Hugging Face": (merge, folder / "ranks"),
    }
    results: dict[str, list[Result]] = {name: [] for name in jobs}
    for number in range(options.rounds):
        for name, (work, source) in jobs.items():
            results[name].append(alone(measure, work, source, folder / "out"))
            shutil.rmtree(folder / "out")
            print(f"round {number + 1} of {options.rounds}: {name}: {results[name][-1]}", flush=True)
    return results


def report(results: dict[str, list[Result]], options: Options) -> str:
    """A markdown table of medians; ratios are medians of the rounds' own."""
    size = results["copy"][0].written / GB
    lines = [
        "# Conversion against a plain copy",
        "",
        f"{time.strftime('%Y-%m-%d')}, {_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, torch {version('torch')}, safetensors {version('safetensors')}. "
        f"Load average at the end: {os.getloadavg()[1]:.1f} (5 minutes), so other work ran beside where it is above 1.",
        "",
        f"A random InternLM of {options.layers} layers, hidden size 2048, in bf16: {size:.2f} GB in shards of 500 MB. "
        f"Medians of {options.rounds} interleaved rounds, each piece of work in a fresh process, fsync included, source cached.",
        "",
        "| work | s (min to max) | GB/s | time / copy | peak anonymous memory |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        seconds = [r.seconds for r in runs]
        middle = statistics.median(seconds)
        ratio = statistics.median(r.seconds / c.seconds for r, c in zip(runs, results["copy"], strict=True))
        memory = max(r.anonymous for r in runs) / 1e6
        rate = runs[0].written / GB / middle
        lines.append(
            f"| {name} | {middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {rate:.2f} | {ratio:.2f} | {memory:.0f} MB |"
        )
    largest = 32000 * 2048 * 2 / 1e6
    lines += [
        "",
        f"The largest tensor has {largest:.0f} MB. Memory is what the work adds to an idle process with its imports done.",
    ]
    return "\n".join(lines) + "\n"


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measures, prints, writes."""
    options = flags.parse(Options, description=Options.__doc__)
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        text = report(run(options, Path(folder)), options)
    print(text)
    if options.out:
        Path(options.out).write_text(text)


if __name__ == "__main__":
    errors.run(main)
