"""How far a conversion is: a bar on a terminal, a line now and then in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Report = Callable[[int], None]
"""Told the bytes that were done since the last call, by any thread."""


@contextmanager
def progress(what: str, total: int, every: float = 10.0) -> Iterator[Report]:
    """Shows bytes, rate and time left of work of `total` bytes; in a log a line every `every` seconds and at the end."""
    if sys.stdout.isatty():
        columns = (
            TextColumn(what),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.advance(task, done)
        return
    start = last = time.monotonic()
    done, lock = 0, threading.Lock()

    def say(now: float) -> None:
        rate = done / max(now - start, 1e-9)
        left = f", {(total - done) / max(rate, 1):.0f} s left" if done < total else f" in {now - start:.1f} s"
        print(f"{what}: {readable(done)} of {readable(total)}, {readable(rate)}/s{left}", flush=True)

    def report(more: int) -> None:
        nonlocal done, last
        with lock:
            done += more
            now = time.monotonic()
            if now - last >= every:
                last = now
                say(now)

    yield report
    say(time.monotonic())


def readable(size: float) -> str:
    """3.2 MB, 14.6 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
