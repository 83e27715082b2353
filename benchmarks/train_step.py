"""Compares the training step with Hugging Face's Llama and torch's AdamW: same shape, weights, batch,
arithmetic.

    python benchmarks/train_step.py --out benchmarks/results/train-step.md
    python benchmarks/train_step.py --device cuda --model internlm-7b --layers 8 --dtypes bf16

Levels: `model` is forward, loss and backward alone. `step` is all of training: ours is the DeepSpeed engine
as the recipe runs it (bf16: ZeRO-1 with fp32 masters and fp32 accumulation; fp32: ZeRO-0 and ZeRO-1), theirs
clips and steps torch's AdamW with its defaults, in bf16 on fp32 masters kept by hand; `fused-step` uses
torch's fused AdamW, as ours does. Each side is a process that steps on request, in turns (A B, B A, ...), so
that both see the same load. The result is the ratio of neighbouring steps, theirs / ours: above 1 ours is
faster. The losses of every step must agree.
"""

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import product_rates

from ascendspeed.cli import parser
from ascendspeed.config.schema import (
    CpuLinearChoice,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    TrainConfig,
)
from ascendspeed.models import estimates
from ascendspeed.models.families import preset
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

SMALL = replace(
    preset("internlm-7b"),
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1376,
    num_attention_heads=8,
    vocab_size=24064,
)
"""50M parameters; the head's share of the work is larger than in the 7B."""
SIDES = {"ours": "ours", "theirs": "Hugging Face"}
SAME = {"fp32": 1e-5, "bf16": 5e-3}
"""Largest relative difference of the sides' losses."""


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Device to run on."""
    model: str = "50m"
    """50m, or a preset such as internlm-7b."""
    layers: int | None = None
    """Number of layers, if the whole model does not fit: the states of both sides are in memory at once."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Number formats."""
    levels: tuple[Literal["model", "step", "fused-step"], ...] = ("model", "step", "fused-step")
    """model: forward, loss, backward; step: with the optimizer, torch's default on the other side;
    fused-step: with torch's fused optimizer, as in this project.
    """
    micro_batch_size: int = 2
    """Samples per step."""
    seq_length: int = 512
    """Tokens per sample."""
    rounds: int = 9
    """Measured steps of each side, after a warm-up step."""
    cpu_linear: CpuLinearChoice = "auto"
    """Matrix products of the project in fp32 on a CPU."""
    threads: int | None = None
    """CPU threads; None: torch's default.

    Use 1 on a shared machine, where waiting threads would distort the measurement.
    """
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


@dataclass(frozen=True)
class StepJob:
    """A combination of level, number format and ZeRO stage."""

    level: str
    dtype: str
    stage: int
    """ZeRO stage of the project's step."""

    def __str__(self) -> str:
        return f"{self.dtype} {self.level}" + (f", ZeRO-{self.stage}" if self.level != "model" else "")


@dataclass(frozen=True)
class JobTimings:
    """All rounds of a job: side -> measurement of every step, and facts about the machine."""

    took: dict[str, list[Any]]
    info: Any

    def ratios(self, clock: Callable[[Any], float]) -> list[float]:
        """Returns theirs / ours of every round."""
        return [
            clock(theirs) / clock(ours)
            for ours, theirs in zip(self.took["ours"], self.took["theirs"], strict=True)
        ]


def jobs(options: Options) -> list[StepJob]:
    """Returns every requested combination; bf16 has no ZeRO-0, and a model alone no ZeRO."""
    stages = {("step", "fp32"): (0, 1), ("fused-step", "fp32"): (0, 1)}
    return [
        StepJob(level, dtype, stage)
        for dtype in options.dtypes
        for level in options.levels
        for stage in stages.get((level, dtype), (1,))
    ]


def model_of(options: Options) -> ModelConfig:
    """Returns the architecture of both sides. Raises UserError if it is unknown or too short."""
    model = SMALL if options.model == "50m" else preset(options.model)
    if options.layers is not None:
        if options.layers < 1:
            raise UserError(f"--layers {options.layers}: at least 1")
        model = replace(model, num_layers=options.layers)
    if not 1 <= options.seq_length <= model.max_position_embeddings:
        raise UserError(
            f"--seq-length {options.seq_length}: {options.model} has 1 to {model.max_position_embeddings} "
            "positions"
        )
    return model


def run_of(options: Options, job: StepJob) -> Run:
    """Returns the run of both sides."""
    size = options.micro_batch_size
    return Run(
        model_of(options),
        ParallelConfig(deepspeed=True, zero_stage=job.stage),
        OptimConfig(bf16=job.dtype == "bf16"),
        DataConfig(seq_length=options.seq_length),
        TrainConfig(
            micro_batch_size=size,
            global_batch_size=size,
            device=options.device,
            cpu_linear=options.cpu_linear,
        ),
    )


@contextmanager
def started(side: str, job: StepJob, options: Options) -> Iterator[Callable[[bool], Any]]:
    """Starts a side in its own process. Calls wait until it is built (False) or does one step (True)."""
    import sides

    fresh = get_context("spawn")
    mine, its = fresh.Pipe()
    process = fresh.Process(
        target=sides.worker, args=(its, side, job.level, run_of(options, job), options.threads)
    )
    process.start()
    its.close()

    def answer(step: bool) -> Any:
        try:
            if step:
                mine.send(True)
            said = mine.recv()
        except EOFError:
            process.join()
            raise UserError(
                f"{SIDES[side]}, {job}: the process died with exit code {process.exitcode}"
            ) from None
        if isinstance(said, Exception):
            raise said if isinstance(said, UserError) else UserError(f"{SIDES[side]}, {job}: {said!r}")
        return said

    try:
        yield answer
    finally:
        process.kill()
        process.join()


def measure(options: Options, job: StepJob) -> JobTimings:
    """Runs the rounds of a job, in turns, and prints each."""
    with started("ours", job, options) as ours, started("theirs", job, options) as theirs:
        sides = {"ours": ours, "theirs": theirs}
        info = {name: side(False) for name, side in sides.items()}["ours"]
        took: dict[str, list[Any]] = {name: [] for name in sides}
        began = time.perf_counter()
        for number in range(options.rounds + 1):
            for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                took[name].append(sides[name](True))
            a, b = took["ours"][-1], took["theirs"][-1]
            check_same(job, number, a.loss, b.loss)
            left = (time.perf_counter() - began) / (number + 1) * (options.rounds - number)
            times = f"ours {a.wall:.2f} s, Hugging Face {b.wall:.2f} s"
            ratios = f"ratio {b.wall / a.wall:.3f} (CPU time {b.cpu / a.cpu:.3f})"
            progress = f"{job}: round {number} of {options.rounds}"
            print(f"{progress}: {times}, {ratios}; {left:.0f} s left", flush=True)
    return JobTimings({name: steps[1:] for name, steps in took.items()}, info)


def check_same(job: StepJob, number: int, ours: float, theirs: float) -> None:
    """Raises UserError if the losses of a step differ by more than rounding."""
    if not math.isclose(ours, theirs, rel_tol=SAME[job.dtype]):
        raise UserError(
            f"{job}: the sides do not compute the same: in step {number} ours lost {ours:.6f}, Hugging Face "
            f"{theirs:.6f}"
        )


def table(measured: dict[StepJob, JobTimings], options: Options) -> str:
    """Formats the medians of both sides, and of the ratios of all rounds."""
    model, tokens = model_of(options), options.micro_batch_size * options.seq_length
    flops = estimates.flops_per_token(model, options.seq_length)
    lines = [
        "| | side | s | tokens/s | TFLOP/s | MFU | peak memory | theirs / ours, wall (min to max) | theirs "
        "/ ours, CPU time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for job, found in measured.items():
        peak = estimates.peak_tflops(found.info.device) if job.dtype == "bf16" else None
        for side, took in found.took.items():
            seconds = statistics.median(t.wall for t in took)
            rate = tokens / seconds
            used = rate * flops / 1e12
            mfu = f"{used / peak:.1%}" if peak else "–"
            ratios = ("", "")
            if side == "ours":
                wall, cpu = (sorted(found.ratios(clock)) for clock in (lambda t: t.wall, lambda t: t.cpu))
                ratios = (
                    f"**{statistics.median(wall):.3f}** ({wall[0]:.3f} to {wall[-1]:.3f})",
                    f"{statistics.median(cpu):.3f}",
                )
            memory = max(t.memory for t in took) / 2**20
            row = (
                job,
                SIDES[side],
                f"{seconds:.3f}",
                f"{rate:.0f}",
                f"{used:.3f}",
                mfu,
                f"{memory:.0f} MiB",
                *ratios,
            )
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def report(measured: dict[StepJob, JobTimings], options: Options) -> str:
    """Formats the markdown file."""
    model, info = model_of(options), next(iter(measured.values())).info
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "megatron-core", "deepspeed", "transformers")
    )
    return (
        f"# Training step against Hugging Face Llama\n\n{datetime.date.today()}, {info.device}, "
        f"{os.cpu_count()} cores, {info.threads} threads per side; Python {platform.python_version()}, "
        f"{versions}. Kernels: {info.kernels}.\n\n"
        f"{options.model}: {estimates.parameter_count(model) / 1e6:.1f}M parameters, {model.num_layers} "
        f"layers, hidden {model.hidden_size}, ffn {model.ffn_hidden_size}, {model.num_attention_heads} "
        f"heads, vocabulary {model.vocab_size}; {options.micro_batch_size} x {options.seq_length} tokens per "
        f"step, {options.rounds} rounds in turns; medians.\n\n"
        f"{table(measured, options)}\n\n"
        "Ratios above 1: ours is faster. Every round's ratio is of neighbouring steps; memory is that of "
        f"stepping{', without the imports' if info.kind == 'cpu' else ''}; the losses of every step were "
        f"equal within rounding.\n{limit(options, info)}"
    )


def limit(options: Options, info: Any) -> str:
    """Returns the rates of the matrix products, most of a step's time; empty on a device or without fp32."""
    if info.kind != "cpu" or "fp32" not in options.dtypes:
        return ""
    import torch

    torch.set_num_threads(info.threads)
    tokens = options.micro_batch_size * options.seq_length
    table = product_rates.training_table(product_rates.weights_of(model_of(options)), tokens)
    return (
        "\n## Rates of the matrix products\n\nfp32, GFLOP/s of CPU time, medians in turns: a step can gain "
        f"at most what its products gain.\n\n{table}\n"
    )


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    model_of(options)
    text = report({job: measure(options, job) for job in jobs(options)}, options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
