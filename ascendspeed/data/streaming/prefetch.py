"""Makes the next batch behind the iteration that uses this one, where batches are work: the tokenizers let other threads run."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """The same function of (split, consumed samples), called ahead in a thread of its own, by one call at a time."""

    def __init__(self, batches: Callable[[str, int], T], step: int) -> None:
        """`step`: how many samples further the next call for a split will be."""
        self._batches, self._step = batches, step
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._ahead: dict[str, tuple[int, Future[T]]] = {}

    def __call__(self, split: str, consumed: int) -> T:
        place, future = self._ahead.pop(split, (None, None))
        if future is None or place != consumed:
            future = self._thread.submit(self._batches, split, consumed)
        if split == "train":  # others are read a few batches at a time, from their beginning
            following = consumed + self._step
            self._ahead[split] = following, self._thread.submit(self._batches, split, following)
        return future.result()
