"""Progress of a long task: a bar on a terminal, a line every few seconds in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ascendspeed.utils.text import readable_size

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY = 10.0
"""Seconds between the lines of a log."""
Advance = Callable[[int], None]
"""Adds to the amount that is done; may be called by any thread."""


class Rate:
    """Amount done so far, per second, and the time that is left."""

    def __init__(self, total: float, done: float = 0) -> None:
        """`done`: finished before this process began; it counts for the position and not for the rate."""
        self.total, self.before, self.amount = total, done, 0.0
        self._began = time.monotonic()

    @property
    def done(self) -> float:
        """Finished in all."""
        return self.before + self.amount

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return max(time.monotonic() - self._began, 1e-9)

    @property
    def per_second(self) -> float:
        """Amount per second, of this process alone."""
        return self.amount / self.seconds

    @property
    def seconds_left(self) -> float:
        """Estimate by the rate so far."""
        return (self.total - self.done) / max(self.per_second, 1e-9)


def of_bytes(label: str) -> Callable[[Rate], str]:
    """Describes work that is counted in bytes."""

    def describe(rate: Rate) -> str:
        end = f", {rate.seconds_left:.0f} s left" if rate.done < rate.total else f" in {rate.seconds:.1f} s"
        done, total, speed = map(readable_size, (rate.done, rate.total, rate.per_second))
        return f"{label}: {done} of {total}, {speed}/s{end}"

    return describe


def of_items(noun: str) -> Callable[[Rate], str]:
    """Describes work that is counted in items (questions, prompts)."""

    def describe(rate: Rate) -> str:
        end = f"{rate.seconds_left:.0f} s left" if rate.done < rate.total else f"in {rate.seconds:.1f} s"
        return f"{rate.done:,.0f} of {rate.total:,.0f} {noun}, {rate.per_second:.1f} {noun}/s, {end}"

    return describe


@contextmanager
def progress(
    describe: Callable[[Rate], str],
    total: float,
    done: float = 0,
    quiet: bool = False,
    every: float = EVERY,
    stream: TextIO | None = None,
) -> Iterator[Advance]:
    """Shows the progress of work of `total` units, `done` of which were finished before; `quiet` shows
    nothing.

    `describe` makes the line of text from the rate. `stream`: stdout by default.
    """
    rate = Rate(total, done)
    lock = threading.Lock()
    stream = stream or sys.stdout
    if quiet:
        yield lambda amount: None
    elif stream.isatty():
        with bar(stream) as live:
            task = live.add_task("", total=total)
            live.update(task, completed=done)

            def advance_bar(amount: int) -> None:
                with lock:
                    rate.amount += amount
                live.update(task, advance=amount, description=describe(rate))

            yield advance_bar
    else:
        last = time.monotonic()

        def advance_log(amount: int) -> None:
            nonlocal last
            with lock:
                rate.amount += amount
                if time.monotonic() - last >= every:
                    last = time.monotonic()
                    print(describe(rate), file=stream, flush=True)

        yield advance_log
        if rate.amount or not done:
            print(describe(rate), file=stream, flush=True)


def bar(stream: TextIO) -> "Progress":
    """A rich progress bar with percentage, description and remaining time; disabled if `stream` is not a
    terminal.
    """
    from rich.console import Console  # not at the top: `--help` needs no progress bar
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=stream)
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
