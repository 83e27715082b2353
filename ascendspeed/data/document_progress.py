"""Progress of preprocessing: a bar on a terminal, lines in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from ascendspeed.utils.progress import bar


class DocumentProgress:
    """Counts documents and bytes, and shows their rates."""

    def __init__(self, log_interval: int) -> None:
        """`log_interval`: documents between two lines of a log."""
        self.documents = 0
        self.bytes = 0
        self._log_interval = log_interval
        self._logged_documents = 0
        self._start = time.monotonic()
        self._bar = bar(sys.stderr)
        self._task = self._bar.add_task("", total=1.0)

    def update(self, documents: int, size: int, fraction: float) -> None:
        """Adds `documents` with `size` bytes of text; `fraction` of the whole input is done."""
        self.documents += documents
        self.bytes += size
        self._bar.update(self._task, completed=fraction, description=self.rates())
        if self._bar.disable and self.documents - self._logged_documents >= self._log_interval:
            self._logged_documents = self.documents
            remaining = self.seconds * (1 - fraction) / max(fraction, 1e-9)
            line = f"{self.rates()}, {fraction:.0%} done, {_format_duration(remaining)} left"
            print(line, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def rates(self) -> str:
        """`12,000 documents, 5,120 documents/s, 4.6 MB/s`."""
        documents_per_second = self.documents / self.seconds
        megabytes_per_second = self.bytes / 1e6 / self.seconds
        return (
            f"{self.documents:,} documents, {documents_per_second:,.0f} documents/s, "
            f"{megabytes_per_second:.1f} MB/s"
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
