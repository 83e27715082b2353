"""Runs the rows: every family and number of processes in one start, the curves and the last weights of each."""

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
from benchmarks.parity import figures, reference, rows
from benchmarks.parity.figures import Bounds, Figures, compare
from benchmarks.parity.reference import BF16, Named, Reference, Trained
from benchmarks.parity.rows import Row

Say = Callable[[str], None]
LONGEST = 3600.0
"""Seconds of one start."""


@dataclass(frozen=True)
class Result:
    """One row of one family."""

    family: str
    row: Row
    figures: Figures | None
    """None: it did not run to its end."""
    broken: list[str]
    """Columns out of bounds."""

    @property
    def good(self) -> bool:
        """As it should be: within bounds, or a control that is not."""
        return self.figures is not None and bool(self.broken) == bool(self.row.control)


class Progress:
    """Says what begins, and about how long the rest takes."""

    def __init__(self, total: int, say: Say) -> None:
        """`total`: rows to come."""
        self.total, self.count, self.say, self.began = total, 0, say, time.monotonic()

    def begins(self, what: str) -> None:
        """One more row."""
        done, self.count = self.count, self.count + 1
        left = f"; {(time.monotonic() - self.began) / done * (self.total - done):.0f} s left" if done else ""
        self.say(f"[{self.count}/{self.total}] {what}{left}")


@dataclass(frozen=True)
class Measured:
    """Everything that came out."""

    results: list[Result]
    bounds: dict[tuple[str, str], Bounds]
    """(family, precision) -> bounds."""
    references: dict[tuple[str, str], Figures]
    """(family, which) -> how far the reference is from itself."""
    steps: int
    seconds: float

    @property
    def good(self) -> bool:
        """Every row within bounds, every control out of them."""
        return all(result.good for result in self.results)


def measure(families: Sequence[str], parts: Sequence[str], steps: int, work: Path, say: Say) -> Measured:
    """All rows whose titles have one of `parts` (none: all). Raises `UserError` when there are none."""
    began, starts = time.monotonic(), rows.chosen(families, parts)
    if not starts:
        raise UserError(f"--rows {' '.join(parts)}: no row of {', '.join(families)} is called so")
    theirs = references_of(starts, steps, work, say)
    apart = {
        (f, name): compare(other, r.end, r.start)
        for f, r in theirs.items()
        for name, other in r.others.items()
    }
    bounds = {}
    for family in theirs:
        optim = rows.run_of(rows.MODELS[family], steps).optim
        bounds[family, "fp32"] = figures.exact(sum(lr_schedule.lr_at(i, optim, steps) for i in range(steps)))
        bounds[family, "bf16"] = figures.band(*(apart[family, name] for name in BF16))
    results, progress = [], Progress(sum(map(len, starts.values())), say)
    for (family, world), wanted in starts.items():
        for row, trained in start(family, world, wanted, theirs[family], steps, work, progress):
            found = compare(trained, theirs[family].end, theirs[family].start) if trained else None
            results.append(
                Result(family, row, found, bounds[family, row.precision].broken(found) if found else [])
            )
    return Measured(results, bounds, apart, steps, time.monotonic() - began)


def references_of(
    starts: dict[tuple[str, int], list[Row]], steps: int, work: Path, say: Say
) -> dict[str, Reference]:
    """family -> what its rows need."""
    found = {}
    for family in dict.fromkeys(family for family, _ in starts):
        say(f"{family}: plain torch over Hugging Face's model")
        mistakes = {
            row.weights for (own, _), some in starts.items() for row in some if own == family and row.weights
        }
        found[family] = reference.reference(family, steps, mistakes, work)
    return found


def start(
    family: str, world: int, wanted: list[Row], theirs: Reference, steps: int, work: Path, progress: Progress
) -> Iterator[tuple[Row, Trained | None]]:
    """One start of processes; every row with its curve and its last weights, or without when the start failed."""
    folder = work / f"{family}-{world}"
    at = {row.title: folder / f"row{i}" for i, row in enumerate(wanted)}
    cases = {
        row.title: rows.case(row, steps, theirs.files[row.weights], str(at[row.title])) for row in wanted
    }
    job = rows.job(theirs.model, steps, cases)
    with watching(
        folder / "rank0.log",
        set(cases),
        lambda title: progress.begins(f"{family}, {world} processes: {title}"),
    ):
        try:
            curves = launch.ranks(world, "engine_worker.py", job, folder, LONGEST)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            progress.say(f"{family}, {world} processes: failed: {error}")
            curves = {}
    for row in wanted:
        yield row, Trained(curves[row.title], last_weights(at[row.title])) if row.title in curves else None


@contextmanager
def watching(log: Path, titles: set[str], tell: Say) -> Iterator[None]:
    """Tells of every case as it begins, for the time of a block."""
    over = threading.Event()

    def look() -> None:
        told: set[str] = set()
        while True:
            last = over.wait(0.2)
            for line in log.read_text().splitlines() if log.exists() else ():
                if line in titles - told:
                    told.add(line)
                    tell(line)
            if last:
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def last_weights(folder: Path) -> Named:
    """Of the checkpoint that a row left, by the names of the family's published ones."""
    opened = open_checkpoint(folder)
    tensors, found = dict(opened.tensors("master")), {}
    for parameter in param_mapping.parameters(opened.config):
        found |= param_mapping.megatron_to_hf(opened.config, parameter, tensors[parameter.name])
    return found
