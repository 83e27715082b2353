"""How far, how fast, how long still: a bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from ascendspeed.utils.progress import bar


class Meter:
    """Counts documents and bytes. `interval` is the number of documents between the lines of a log."""

    def __init__(self, interval: int) -> None:
        self.interval, self.documents, self.bytes, self.fraction = interval, 0, 0, 0.0
        self._began, self._said = time.monotonic(), 0
        self._bar = bar(sys.stderr)
        self._task = self._bar.add_task("", total=1.0)

    def update(self, documents: int, size: int, fraction: float) -> None:
        """Adds `documents` of `size` bytes of text; `fraction` of the input is done in all."""
        self.documents += documents
        self.bytes += size
        self.fraction = fraction
        self._bar.update(self._task, completed=fraction, description=self.rates())
        if self._bar.disable and self.documents - self._said >= self.interval:
            self._said = self.documents
            left = self.seconds * (1 - fraction) / max(fraction, 1e-9)
            print(f"{self.rates()}, {fraction:.0%} done, {_clock(left)} left", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return max(time.monotonic() - self._began, 1e-9)

    def rates(self) -> str:
        """`12,000 documents, 5,120 documents/s, 4.6 MB/s`."""
        per_second = self.documents / self.seconds, self.bytes / 1e6 / self.seconds
        return f"{self.documents:,} documents, {per_second[0]:,.0f} documents/s, {per_second[1]:.1f} MB/s"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
