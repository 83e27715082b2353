"""Where the places of streams are kept, and what is said when there are none and a run has to go a long way again."""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from ascendspeed.data.streaming.stream import SAVE_EVERY

logger = logging.getLogger(__name__)

LOG_SECONDS = 10
"""Between two lines of progress."""


class PositionCache:
    """The folder of one split's places."""

    def __init__(self, cache: Path, name: str, split: str, said: str) -> None:
        """`said`: all that decides where samples begin."""
        self._done, self._told = 0, 0.0
        digest = hashlib.sha256(said.encode()).hexdigest()[:16]
        self.folder: Path | None = cache / f"{name}-{split}-{digest}"
        others = (
            [p for p in cache.glob(f"{name}-{split}-*") if p.is_dir() and p != self.folder]
            if cache.is_dir()
            else []
        )
        if others and not self.folder.is_dir():
            logger.info(
                f"{others[0]} is of other data or settings than these; it is left alone, and places are kept in {self.folder.name}"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.info(
                f"note: {cache}: places cannot be kept there ({error.strerror}); give --data-cache-path, or a resumed run is slow"
            )
            self.folder = None

    def file(self, stream: int) -> Path | None:
        """That of a stream's places."""
        return self.folder and self.folder / f"stream-{stream:02}.npy"

    def passing(self, missing: int, streams: int) -> Callable[[], None]:
        """What to call for each of the `missing` samples that a stream must make again."""
        if missing <= SAVE_EVERY:
            return lambda: None
        if not self._told:
            where = f"there are none in {self.folder}" if self.folder else "none are kept"
            logger.info(
                f"the places where samples begin are not known ({where}): about {missing * streams:,} are tokenized again"
            )
            self._told = time.monotonic()

        def passed() -> None:
            self._done += 1
            if time.monotonic() - self._told > LOG_SECONDS:
                self._told = time.monotonic()
                logger.info(f"{self._done:,} samples tokenized again")

        return passed
