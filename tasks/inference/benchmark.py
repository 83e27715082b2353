"""Times a model's answers for given lengths; `benchmark.sh` is its front. See the README of examples/intern, Inference.

python tasks/inference/benchmark.py --load DIR --performance [[256,256],[512,512]] --batch-size 4
python tasks/inference/benchmark.py --load DIR --performance-maxbs [[256,256]] --ranges [[1,64]] --limit-ms 50
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import parser
from ascendspeed.cli.train_args import DEFAULT_MODEL, RecipeFlags, world_size
from ascendspeed.config.schema import ModelConfig
from ascendspeed.inference import benchmark_report
from ascendspeed.inference.args import Place, Where, find_place, notes
from ascendspeed.models import families
from ascendspeed.utils import errors
from ascendspeed.utils import logging as logs
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What to time."""

    performance: str | None = None
    """Pairs of input and output length to time at --batch-size: [[2048,2048],[256,256]]."""
    performance_maxbs: str | None = None
    """Pairs of lengths to find the largest batch for, within --ranges and --limit-ms."""
    batch_size: int = 1
    """Prompts side by side, for --performance."""
    ranges: str | None = None
    """Smallest and largest batch, for each pair of --performance-maxbs: [[1,2048],[1,2048]]."""
    limit_ms: float = 50.0
    """Milliseconds that a further token of --performance-maxbs may take."""
    output_dir: str = "performance"
    """Folder for performance.txt, .csv and .png."""


@dataclass(frozen=True)
class Command:
    """Times a model's answers: the first token, each further one, tokens per second."""

    recipe: FlagCreatePairsOff[RecipeFlags] = field(default_factory=RecipeFlags)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))
    where: FlagCreatePairsOff[Where] = field(default_factory=Where)
    options: FlagCreatePairsOff[Options] = field(default_factory=Options)


def main() -> None:
    """Parse -> device -> model -> table."""
    command = parser.parse(Command, description=Command.__doc__ or "")
    typed, options = parser.typed(Command), command.options
    cases, ranges = _cases(options)
    place = find_place(command, typed, sys.argv[1:], world_size())

    from ascendspeed.distributed import device as devices

    device = devices.prepare(place.where.device, place.where.distributed_backend)

    from ascendspeed.distributed import process_groups
    from ascendspeed.inference import benchmark, engine

    if place.where.fp16 and device.kind == "cpu":
        raise UserError("--fp16 is 100 times slower than fp32 on a CPU; use --bf16 or neither")
    logs.configure(streams=logs.TO_STDERR)
    model = engine.load(place.where.load, parallel=place.where.layout, dtype=place.where.dtype, device=device)
    for note in notes(typed):
        logger.info(f"note: {note}")
    found = benchmark.run_cases(model, cases, ranges, options.batch_size, options.limit_ms / 1e3)
    if model.grid.rank == 0:
        text = benchmark_report.write_report(
            found, Path(options.output_dir), _title(place, f"{device.kind} ({device.name})")
        )
        print(text, end="", flush=True)
    process_groups.destroy()


def _cases(options: Options) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(lengths, ranges of batches; empty for --performance). Raises `UserError`."""
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
            f"--ranges {options.ranges} must have a pair, smallest and largest batch, for each of the {len(cases)} lengths"
        )
    return cases, ranges


def _title(place: Place, device: str) -> str:
    where = place.where
    return f"{where.load}, {where.dtype}, TP {where.tensor_model_parallel_size} x PP {where.pipeline_model_parallel_size}, {device}"


if __name__ == "__main__":
    errors.run(main)
