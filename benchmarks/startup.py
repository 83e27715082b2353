"""Compares the time that commands take to start with that of importing torch and transformers, in turns.

    python benchmarks/startup.py --out benchmarks/results/startup-cpu.md

Training runs one step of a tiny model, generation generates one token, and every other command prints its
help. Each runs in a fresh interpreter; the result is the median of wall and CPU seconds, and the ratio of the
CPU seconds to those of the peer.
"""

import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parents[1]
PEER = "import torch, transformers"
HELP = {
    "pretrain_intern.py": ["pretrain_intern.py"],
    "generate.py": ["tasks/inference/generate.py"],
    "serve.py": ["tasks/inference/serve.py"],
    "evaluation.py": ["tasks/evaluation/evaluation.py"],
    "preprocess_data.py": ["tools/preprocess_data.py"],
    "convert.py": ["tools/ckpt_convert/convert.py"],
}


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    rounds: int = 3
    """Measured runs of each command, after a warm-up run."""
    threads: int = 1
    """CPU threads of each command (OMP_NUM_THREADS)."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


@dataclass(frozen=True)
class Seconds:
    """Time of one run of a command."""

    wall: float
    cpu: float


def commands(folder: Path) -> dict[str, list[str]]:
    """Returns name -> arguments of the interpreter."""
    training = [
        "pretrain_intern.py",
        *("--load", str(folder / "hf"), "--data-path", str(folder / "alpaca_text_document")),
        *("--device", "cpu", "--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "1"),
        *("--train-iters", "1", "--lr", "1e-3", "--log-dir", str(folder / "logs")),
    ]
    generation = [
        "tasks/inference/generate.py",
        *("--load", str(folder / "hf"), "--device", "cpu", "--prompt", "the first", "--max-new-tokens", "1"),
    ]
    helps = {f"`{name} --help`": [*script, "--help"] for name, script in HELP.items()}
    return {
        f'`python -c "{PEER}"`': ["-c", PEER],
        "training to its first step, Megatron engine": training,
        "training to its first step, DeepSpeed engine": [*training, "--deepspeed"],
        "generation to its first token": generation,
        **helps,
    }


def prepare(folder: Path) -> None:
    """Writes a tokenizer, tokens, and a tiny model with random weights."""
    data = folder / "data"
    _run(["examples/intern/make_quickstart_data.py", "--output-dir", str(data)])
    tokenizer = str(data / "tokenizer")
    preprocess = [
        "tools/preprocess_data.py",
        *("--input", str(data / "train.parquet"), "--tokenizer-name-or-path", tokenizer),
        *("--output-prefix", str(folder / "alpaca"), "--tokenizer-type", "PretrainedFromHF"),
        *("--handler-name", "AlpacaPretrainHandler", "--append-eod"),
    ]
    _run(preprocess)
    model = ["--model", "internlm-tiny", "--tokenizer", tokenizer, "--output-dir", str(folder / "hf")]
    _run(["tools/random_model.py", *model])


def _run(arguments: list[str], threads: int = 1) -> Seconds:
    """Runs Python in the root of the repository. Raises `UserError` if it fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        raise UserError(
            f"{' '.join(arguments)} ended with exit code {result.returncode}: {result.stderr[-500:]}"
        )
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(options: Options) -> str:
    """Runs every command in turns and returns the report."""
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home))
        times: dict[str, list[Seconds]] = {name: [] for name in commands(Path(home))}
        for number in range(options.rounds + 1):
            for name, arguments in commands(Path(home)).items():
                seconds = _run(arguments, options.threads)
                if number:
                    times[name].append(seconds)
                    print(
                        f"round {number}: {name}: {seconds.wall:.1f} s, {seconds.cpu:.1f} s of CPU",
                        flush=True,
                    )
    return _markdown(options, times)


def _markdown(options: Options, times: dict[str, list[Seconds]]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "megatron-core"))
    lines = [
        "# Start-up of the commands",
        "",
        f"{datetime.date.today()}, CPU, {options.threads} thread(s), load {os.getloadavg()[0]:.0f} with that "
        f"of others; Python {platform.python_version()}, {versions}",
        "",
        f"Fresh interpreters, files in the page cache, medians of {options.rounds} rounds in turns.",
        "",
        "| command | s | CPU s | CPU s / peer's |",
        "|---|---|---|---|",
    ]
    peer = next(iter(times.values()))
    for name, runs in times.items():
        wall, cpu = (statistics.median(getattr(run, key) for run in runs) for key in ("wall", "cpu"))
        ratio = statistics.median(run.cpu / other.cpu for run, other in zip(runs, peer, strict=True))
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {ratio:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    if options.rounds < 1 or options.threads < 1:
        raise UserError("--rounds and --threads must be at least 1")
    text = measure(options)
    print(text)
    if options.out:
        from ascendspeed.utils.atomic import write_file

        write_file(options.out, text)


if __name__ == "__main__":
    errors.run(main)
