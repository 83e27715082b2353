"""Prefetches the next batch in a thread: tokenizers release the GIL, so this overlaps with the current
iteration."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Wraps a function of (split, consumed samples) and calls it in advance, one call at a time, in a thread
    of its own."""

    def __init__(self, batches: Callable[[str, int], T], step: Callable[[int], int]) -> None:
        """`step`: samples to the next call for the split `train`, after so many consumed ones."""
        self._batches = batches
        self._step = step
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._pending: dict[str, tuple[int, Future[T]]] = {}

    def __call__(self, split: str, consumed: int) -> T:
        prefetched, future = self._pending.pop(split, (None, None))
        if future is None or prefetched != consumed:
            future = self._thread.submit(self._batches, split, consumed)
        if split == "train":  # other splits are read a few batches at a time, from their beginning
            following = consumed + self._step(consumed)
            self._pending[split] = following, self._thread.submit(self._batches, split, following)
        return future.result()
