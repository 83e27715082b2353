"""Ctrl-C in a conversation: ends the answer; at the prompt, ends the conversation."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class InterruptHandler:
    """Context manager that handles SIGINT, even if the shell has set it to be ignored.

    The ranks are interrupted at slightly different times; the sampling rank decides which token is the last
    one.
    """

    def __init__(self) -> None:
        self.requested = False
        """True if the answer is to end. A second signal raises KeyboardInterrupt: prefill of a long prompt
        may take a while."""
        self._raises = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Makes SIGINT raise KeyboardInterrupt inside the block, where there is no answer to end."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raises or self.requested:
            raise KeyboardInterrupt
        self.requested = True
