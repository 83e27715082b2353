"""How many questions, how fast, how long still: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[], None]
"""Told of each question that is answered."""


@contextmanager
def progress(total: int, done: int = 0, quiet: bool = False, every: float = 10.0) -> Iterator[Advance]:
    """Shows the questions, `done` of which were answered before; in a log a line every `every` seconds and at the end."""
    if quiet:
        yield lambda: None
        return
    if sys.stdout.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TimeRemainingColumn()) as bar:
            clock, task = Clock(total, done), bar.add_task("questions", total=total, completed=done, rate="")

            def step() -> None:
                clock.count += 1
                bar.update(task, advance=1, rate=f"{clock.rate:.1f}/s")

            yield step
        return
    clock = Clock(total, done)
    last = clock.began

    def line() -> None:
        nonlocal last
        clock.count += 1
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(clock, flush=True)

    yield line
    if clock.count:
        print(clock, flush=True)


class Clock:
    """Counts since it was made."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.count, self.began = total, done, 0, time.monotonic()

    @property
    def rate(self) -> float:
        """Questions per second, of this program alone."""
        return self.count / max(time.monotonic() - self.began, 1e-9)

    def __str__(self) -> str:
        left = self.total - self.done - self.count
        when = (
            f"{left / max(self.rate, 1e-9):.0f} s left"
            if left
            else f"in {time.monotonic() - self.began:.1f} s"
        )
        return f"{self.done + self.count:,} of {self.total:,} questions, {self.rate:.1f} questions/s, {when}"
