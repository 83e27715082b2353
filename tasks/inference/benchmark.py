"""Measures the speed of generation for given lengths; `benchmark.sh` starts it (examples/intern/README.md).

python tasks/inference/benchmark.py --load DIR --performance [[256,256],[512,512]] --batch-size 4
python tasks/inference/benchmark.py --load DIR --performance-maxbs [[256,256]] --ranges [[1,64]] --limit-ms 50
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import command, parser
from ascendspeed.cli.compat import INFERENCE
from ascendspeed.cli.train_args import DEFAULT_MODEL, Preset
from ascendspeed.config.schema import ModelConfig
from ascendspeed.inference import benchmark_report
from ascendspeed.inference.args import EngineArgs, EngineSpec, resolve_engine
from ascendspeed.models import families
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

logger = logging.getLogger("ascendspeed.benchmark")

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class BenchmarkArgs:
    """Lengths and batch sizes to measure."""

    performance: str | None = None
    """Pairs of input and output length to measure at --batch-size: [[2048,2048],[256,256]]."""
    performance_maxbs: str | None = None
    """Pairs of lengths to find the largest batch for, within --ranges and --limit-ms."""
    batch_size: int = 1
    """Prompts per batch, for --performance."""
    ranges: str | None = None
    """Smallest and largest batch for each pair of --performance-maxbs: [[1,2048],[1,2048]]."""
    limit_ms: float = 50.0
    """Longest decoding step in milliseconds, for --performance-maxbs."""
    output_dir: Annotated[str, parser.output_flag("output-dir")] = "performance"
    """Folder for performance.txt, .csv and .png."""


@dataclass(frozen=True)
class BenchmarkCommand:
    """Measures the time to the first token, the time of each further token, and tokens per second."""

    benchmark: FlagCreatePairsOff[BenchmarkArgs] = field(default_factory=BenchmarkArgs)
    engine: FlagCreatePairsOff[EngineArgs] = field(default_factory=EngineArgs)
    preset: FlagCreatePairsOff[Preset] = field(default_factory=Preset)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))


@dataclass(frozen=True)
class BenchmarkJob:
    """A checked command line of the benchmark."""

    spec: EngineSpec
    benchmark: BenchmarkArgs
    cases: Pairs
    """(input length, output length)."""
    ranges: Pairs
    """(smallest batch, largest batch) of each case; empty for --performance."""


def resolve(args: Sequence[str], world: int) -> tuple[BenchmarkJob, list[str]]:
    """Returns the job of `args` for `world` processes, and notes for the user. Raises UserError."""
    line = command.parse(BenchmarkCommand, args, INFERENCE, __doc__ or "")
    cases, ranges = _cases(line.options.benchmark)
    return BenchmarkJob(resolve_engine(line, world), line.options.benchmark, cases, ranges), line.notes


def work(job: BenchmarkJob, device: Any, notes: Sequence[str]) -> None:
    """Loads the model, measures, and writes the table."""
    from ascendspeed.inference.benchmark import BenchmarkCase, run_cases
    from ascendspeed.inference.session import ModelSession

    session = ModelSession.open(job.spec, device)
    for note in notes:
        logger.info(f"note: {note}")
    batch_ranges = job.ranges or [None] * len(job.cases)
    cases = [
        BenchmarkCase(prompt_tokens, new_tokens, job.benchmark.batch_size, batch_range)
        for (prompt_tokens, new_tokens), batch_range in zip(job.cases, batch_ranges, strict=True)
    ]
    timings = run_cases(session.model, cases, job.benchmark.limit_ms / 1e3)
    if session.grid.rank == 0:
        title = _title(job.spec.args, f"{device.kind} ({device.name})")
        text = benchmark_report.write_report(timings, Path(job.benchmark.output_dir), title)
        print(text, end="", flush=True)


def _cases(options: BenchmarkArgs) -> tuple[Pairs, Pairs]:
    """Parses lengths, and ranges of batches (none for --performance). Raises UserError."""
    if (options.performance is None) == (options.performance_maxbs is None):
        raise UserError(
            "give --performance or --performance-maxbs, one of them, with pairs of input and output length"
        )
    if options.batch_size < 1 or not options.limit_ms > 0:
        raise UserError(
            f"--batch-size {options.batch_size} and --limit-ms {options.limit_ms} must be above 0"
        )
    if options.performance is not None:
        return benchmark_report.parse_pairs(options.performance, "--performance"), []
    cases = benchmark_report.parse_pairs(options.performance_maxbs or "", "--performance-maxbs")
    if any(outputs < 2 for _, outputs in cases):
        raise UserError(
            "--performance-maxbs needs outputs of at least 2 tokens: the first one is not counted"
        )
    ranges = benchmark_report.parse_pairs(options.ranges or "null", "--ranges")
    if len(ranges) != len(cases) or any(low > high for low, high in ranges):
        raise UserError(
            f"--ranges {options.ranges} must have a pair, smallest and largest batch, for each of the "
            f"{len(cases)} lengths"
        )
    return cases, ranges


def _title(args: EngineArgs, device: str) -> str:
    layout = f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size}"
    return f"{args.load}, {args.precision}, {layout}, {device}"


def main() -> None:
    """Runs the command."""
    command.run_inference(resolve, work)


if __name__ == "__main__":
    errors.run(main)
