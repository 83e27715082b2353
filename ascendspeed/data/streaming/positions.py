"""Cache of sample positions, so that a resumed run need not tokenize again what it has consumed."""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from ascendspeed.data.streaming.stream import SAVE_EVERY

logger = logging.getLogger(__name__)

LOG_SECONDS = 10
"""Seconds between two lines of progress."""


class PositionCache:
    """The folder with the positions of one split's streams, and the log lines when positions are missing."""

    def __init__(self, cache: Path, name: str, split: str, key: str) -> None:
        """`key`: text of everything that determines where samples begin."""
        self._replayed = 0
        self._last_line = 0.0
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.folder: Path | None = cache / f"{name}-{split}-{digest}"
        others = []
        if cache.is_dir():
            others = [p for p in cache.glob(f"{name}-{split}-*") if p.is_dir() and p != self.folder]
        if others and not self.folder.is_dir():
            logger.info(
                f"{others[0]} is of other data or settings than these; it is left alone, "
                f"and positions are stored in {self.folder.name}"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.info(
                f"note: {cache}: positions cannot be stored there ({error.strerror}); "
                "give --data-cache-path, or a resumed run is slow"
            )
            self.folder = None

    def file(self, stream: int) -> Path | None:
        """Returns the file of a stream's positions; None without a cache."""
        return self.folder and self.folder / f"stream-{stream:02}.npy"

    def replay_progress(self, missing: int, streams: int) -> Callable[[], None]:
        """Returns a function to call for each of the `missing` samples that a stream must pack again."""
        if missing <= SAVE_EVERY:
            return lambda: None
        if not self._last_line:
            reason = f"there are none in {self.folder}" if self.folder else "none are stored"
            logger.info(
                f"the positions where samples begin are not known ({reason}): "
                f"about {missing * streams:,} are tokenized again"
            )
            self._last_line = time.monotonic()

        def count() -> None:
            self._replayed += 1
            if time.monotonic() - self._last_line > LOG_SECONDS:
                self._last_line = time.monotonic()
                logger.info(f"{self._replayed:,} samples tokenized again")

        return count
