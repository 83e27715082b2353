"""Runs the rows: every family and number of processes in one start, the curves and the last weights of each."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import launch

from ascendspeed import checkpoint, schedule, weights
from ascendspeed.errors import UserError
from benchmarks.parity import figures, reference, rows
from benchmarks.parity.figures import Bounds, Figures
from benchmarks.parity.reference import Named, Reference, Trained
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


@dataclass(frozen=True)
class Measured:
    """Everything that came out."""

    results: list[Result]
    bounds: dict[tuple[str, bool], Bounds]
    """(family, bf16) -> bounds."""
    noise: dict[tuple[str, bool], Figures]
    """(family, bf16) -> how far the reference is from itself in another order of summation."""
    steps: int
    seconds: float

    @property
    def good(self) -> bool:
        """Every row within bounds, every control out of them."""
        return all(result.good for result in self.results)


def measure(families: list[str], parts: list[str], steps: int, work: Path, say: Say) -> Measured:
    """All rows whose titles have one of `parts` (none: all). Raises `UserError` when there are none."""
    began, starts = time.monotonic(), rows.chosen(families, parts)
    if not starts:
        raise UserError(f"--rows {' '.join(parts)}: no row of {', '.join(families)} is called so")
    references, results = references_of(starts, steps, work, say), []
    measured = Measured(results, {}, {}, steps, 0.0)
    for family, bf16 in sorted({(family, row.bf16) for (family, _), wanted in starts.items() for row in wanted}):
        optim = rows.run_of(rows.MODELS[family], steps).optim
        way = sum(schedule.lr_at(i, optim, steps) for i in range(steps))
        measured.bounds[family, bf16] = figures.bounds(references[family], bf16, way)
        measured.noise[family, bf16] = figures.noise(references[family], bf16)
    tell = progress(sum(map(len, starts.values())), say)
    for (family, world), wanted in starts.items():
        for row, trained in start(family, world, wanted, references[family], steps, work, tell):
            found = figures.of_row(trained, references[family], row.bf16) if trained else None
            results.append(Result(family, row, found, measured.bounds[family, row.bf16].broken(found) if found else []))
    return Measured(results, measured.bounds, measured.noise, steps, time.monotonic() - began)


def references_of(starts: dict[tuple[str, int], list[Row]], steps: int, work: Path, say: Say) -> dict[str, Reference]:
    """family -> what its rows need."""
    found = {}
    for family in dict.fromkeys(family for family, _ in starts):
        say(f"{family}: plain torch over Hugging Face's model")
        wanted = [row for (own, _), some in starts.items() for row in some if own == family]
        mistakes = {row.weights for row in wanted if row.weights}
        found[family] = reference.reference(family, steps, mistakes, any(row.bf16 for row in wanted), work)
    return found


def start(
    family: str, world: int, wanted: list[Row], theirs: Reference, steps: int, work: Path, tell: Callable[[str], None]
) -> Iterator[tuple[Row, Trained | None]]:
    """One start of processes; every row with its curve and its last weights, or without when the start failed."""
    folder = work / f"{family}-{world}"
    at = {row.title: folder / f"row{i}" for i, row in enumerate(wanted)}
    cases = {row.title: rows.case(row, steps, theirs.files[row.weights], str(at[row.title])) for row in wanted}
    job = rows.job(theirs.model, steps, cases)
    with ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(launch.ranks, world, "engine_worker.py", job, folder, LONGEST)
        watch(ranks.done, folder / "rank0.log", set(cases), lambda title: tell(f"{family}, {world} processes: {title}"))
        try:
            curves = ranks.result()
        except (AssertionError, OSError) as error:
            tell(f"{family}, {world} processes: failed\n{error}")
            curves = {}
    for row in wanted:
        yield row, Trained(curves[row.title], last_weights(at[row.title])) if row.title in curves else None


def watch(done: Callable[[], bool], log: Path, titles: set[str], tell: Callable[[str], None]) -> None:
    """Tells of every case as it begins."""
    told: set[str] = set()
    while not done():
        time.sleep(0.2)
        for line in log.read_text().splitlines() if log.exists() else ():
            if line in titles - told:
                told.add(line)
                tell(line)


def progress(total: int, say: Say) -> Callable[[str], None]:
    """Says what begins, and about how long the rest takes."""
    began, count = time.monotonic(), 0

    def tell(what: str) -> None:
        nonlocal count
        done, count = count, count + 1
        left = f"; {(time.monotonic() - began) / done * (total - done):.0f} s left" if done else ""
        say(f"[{count}/{total}] {what}{left}")

    return tell


def last_weights(folder: Path) -> Named:
    """Of the checkpoint that a row left, by the names of the family's published ones."""
    opened = checkpoint.open_checkpoint(folder, say=lambda text: None)
    tensors, found = dict(opened.tensors("master")), {}
    for parameter in weights.parameters(opened.config):
        found |= weights.part(opened.config, parameter, tensors[parameter.name])
    return found


def records(measured: Measured) -> str:
    """For a machine: JSON."""
    return json.dumps(measured, default=lambda value: vars(value))
