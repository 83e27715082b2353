"""Runs the rows: one start of processes for every family and number of processes."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers import launch

from ascendspeed.checkpoint.discovery import open_checkpoint
from ascendspeed.config import lr_schedule
from ascendspeed.models import param_mapping
from ascendspeed.utils.errors import UserError
from benchmarks.parity_matrix import differences, layouts, reference
from benchmarks.parity_matrix.differences import Bounds, Differences, compare
from benchmarks.parity_matrix.layouts import MatrixRow
from benchmarks.parity_matrix.reference import BF16, NamedTensors, Reference, TrainedModel

Say = Callable[[str], None]
TIMEOUT = 3600.0
"""Timeout of one start in seconds."""


@dataclass(frozen=True)
class RowResult:
    """Outcome of a row for one family."""

    family: str
    row: MatrixRow
    differences: Differences | None
    """Differences from the reference; None: the run did not finish."""
    broken: list[str]
    """Columns out of bounds."""

    @property
    def good(self) -> bool:
        """True for a row within bounds, and for a control out of them."""
        return self.differences is not None and bool(self.broken) == bool(self.row.control)


class ProgressLog:
    """Prints each row as it begins, with the estimated remaining time."""

    def __init__(self, total: int, say: Say) -> None:
        """`total`: number of rows."""
        self.total = total
        self.count = 0
        self.say = say
        self.started = time.monotonic()

    def begins(self, row: str) -> None:
        """Counts and prints one more row."""
        done, self.count = self.count, self.count + 1
        seconds = time.monotonic() - self.started
        left = f"; {seconds / done * (self.total - done):.0f} s left" if done else ""
        self.say(f"[{self.count}/{self.total}] {row}{left}")


@dataclass(frozen=True)
class MatrixResults:
    """All results of a run of the matrix."""

    results: list[RowResult]
    bounds: dict[tuple[str, str], Bounds]
    """(family, precision) -> bounds."""
    references: dict[tuple[str, str], Differences]
    """(family, name) -> differences of a further reference from the main one."""
    steps: int
    seconds: float

    @property
    def good(self) -> bool:
        """True if every row is within bounds and every control out of them."""
        return all(result.good for result in self.results)


def run_matrix(
    families: Sequence[str], parts: Sequence[str], steps: int, work: Path, say: Say, onednn: bool = False
) -> MatrixResults:
    """Runs all rows whose titles contain one of `parts` (none: all). Raises UserError if there are none.

    `onednn`: oneDNN computes the products of the linears in fp32.
    """
    started, starts = time.monotonic(), layouts.select_rows(families, parts)
    if not starts:
        raise UserError(f"--rows {' '.join(parts)}: no row of {', '.join(families)} has such a title")
    references = train_references(starts, steps, work, say)
    reference_differences = {}
    bounds = {}
    for family, of_family in references.items():
        for name, other in of_family.others.items():
            reference_differences[family, name] = compare(other, of_family.end, of_family.start)
        optim = layouts.base_run(layouts.MODELS[family], steps).optim
        lr_sum = sum(lr_schedule.lr_at(i, optim, steps) for i in range(steps))
        bounds[family, "fp32"] = differences.fp32_bounds(lr_sum)
        bf16_differences = [reference_differences[family, name] for name in BF16]
        bounds[family, "bf16"] = differences.bf16_bounds(*bf16_differences)
    results: list[RowResult] = []
    progress = ProgressLog(sum(map(len, starts.values())), say)
    for (family, world), rows in starts.items():
        expected = references[family]
        for row, trained in run_ranks(family, world, rows, expected, steps, work, progress, onednn):
            measured = compare(trained, expected.end, expected.start) if trained else None
            broken = bounds[family, row.precision].broken(measured) if measured else []
            results.append(RowResult(family, row, measured, broken))
    return MatrixResults(results, bounds, reference_differences, steps, time.monotonic() - started)


def train_references(
    starts: dict[tuple[str, int], list[MatrixRow]], steps: int, work: Path, say: Say
) -> dict[str, Reference]:
    """Trains the references of every family."""
    mistakes: dict[str, set[str]] = {}
    for (family, _), rows in starts.items():
        mistakes.setdefault(family, set()).update(row.weights for row in rows if row.weights)
    references = {}
    for family, names in mistakes.items():
        say(f"{family}: plain torch over Hugging Face's model")
        references[family] = reference.build_reference(family, steps, names, work)
    return references


def run_ranks(
    family: str,
    world: int,
    rows: list[MatrixRow],
    expected: Reference,
    steps: int,
    work: Path,
    progress: ProgressLog,
    onednn: bool = False,
) -> Iterator[tuple[MatrixRow, TrainedModel | None]]:
    """Runs one start of processes.

    Yields every row with its metrics and final weights, or None if the start failed.
    """
    folder = work / f"{family}-{world}"
    checkpoints = {row.title: folder / f"row{i}" for i, row in enumerate(rows)}
    cases = {
        row.title: {
            **layouts.worker_case(row, steps, expected.files[row.weights], str(checkpoints[row.title])),
            "onednn": onednn,
        }
        for row in rows
    }
    job = layouts.worker_job(expected.model, steps, cases)

    def report(title: str) -> None:
        progress.begins(f"{family}, {world} processes: {title}")

    with report_cases(folder / "rank0.log", set(cases), report):
        try:
            curves = launch.ranks(world, "engine_worker.py", job, folder, TIMEOUT)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            progress.say(f"{family}, {world} processes: failed: {error}")
            curves = {}
    for row in rows:
        trained = None
        if row.title in curves:
            trained = TrainedModel(curves[row.title], load_final_weights(checkpoints[row.title]))
        yield row, trained


@contextmanager
def report_cases(log: Path, titles: set[str], report: Say) -> Iterator[None]:
    """Calls `report` with the title of every case as it begins, during the block."""
    finished = threading.Event()

    def watch() -> None:
        reported: set[str] = set()
        while True:
            last = finished.wait(0.2)
            for line in log.read_text().splitlines() if log.exists() else ():
                if line in titles - reported:
                    reported.add(line)
                    report(line)
            if last:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def load_final_weights(folder: Path) -> NamedTensors:
    """Loads the weights of a row's checkpoint by the names of the family's published checkpoints."""
    checkpoint = open_checkpoint(folder)
    tensors = dict(checkpoint.tensors("master"))
    weights = {}
    for parameter in param_mapping.parameters(checkpoint.config):
        weights |= param_mapping.megatron_to_hf(checkpoint.config, parameter, tensors[parameter.name])
    return weights
