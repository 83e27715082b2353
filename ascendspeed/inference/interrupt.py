"""Ctrl-C in a conversation: it ends the answer; where there is none, the conversation."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class InterruptHandler:
    """Listens to SIGINT between `with` and its end, also where a shell has had it ignored.

    The ranks are interrupted a moment apart: which token is an answer's last one is decided where tokens are chosen.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether the answer is to end. A second signal raises KeyboardInterrupt: reading a long prompt may take a while."""
        self._leaves = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Where there is no answer to end, SIGINT raises KeyboardInterrupt."""
        self._leaves = True
        try:
            yield
        finally:
            self._leaves = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._leaves or self.asked:
            raise KeyboardInterrupt
        self.asked = True
