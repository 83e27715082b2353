"""Accounting of tensor memory by category: live bytes, their peak, and where in the step it is."""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Label = tuple[str, str]
"""(category, module) of an allocation."""

DEVICE_BLOCK = 512
"""Bytes to which the caching allocator of a device rounds every block."""


@dataclass
class Allocation:
    """One live storage."""

    reference: weakref.ref
    bytes: int
    label: Label


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returns while the mode is active.

    Memory that an operation uses only inside itself is not seen, nor is what libraries allocate without
    torch.
    `granularity`: bytes to which every storage is rounded up; 1 on a CPU.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()
        self.granularity = granularity
        self.live = self.peak = 0
        self.by_label: Counter[Label] = Counter()
        self.label: Label = ("model", "")
        self.place = ""
        """Part of the step that runs now."""
        self._allocations: dict[int, Allocation] = {}
        self._at_peak: tuple[str, Counter[Label]] | None = None
        self._peak_place = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operation and counts what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._count(value, str(func))
        return out

    def _count(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self._rounded(storage.nbytes())
        known = self._allocations.get(key)
        if known is None:
            reference = weakref.ref(storage, lambda _, key=key: self._release(key))
            self._allocations[key] = known = Allocation(reference, 0, self.label)
        if size != known.bytes:
            self._change(known, size, operation)

    def _change(self, allocation: Allocation, size: int, operation: str) -> None:
        difference = size - allocation.bytes
        if difference < 0:
            self._before_decrease()
        allocation.bytes = size
        self.live += difference
        self.by_label[allocation.label] += difference
        if self.live > self.peak:
            self.peak, self._at_peak = self.live, None
            self._peak_place = f"{self.place}, {operation}"

    def _release(self, key: int) -> None:
        allocation = self._allocations.pop(key, None)
        if allocation is not None:
            self._change(allocation, 0, "")

    def _before_decrease(self) -> None:
        """Copies the categories at a peak only when it is over: most new peaks are passed at once."""
        if self._at_peak is None and self.live == self.peak:
            self._at_peak = self._peak_place, Counter(self.by_label)

    def _rounded(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity

    @property
    def at_peak(self) -> tuple[str, Counter[Label]]:
        """(place, bytes by label) at the peak."""
        self._before_decrease()
        return self._at_peak or (self._peak_place, Counter(self.by_label))

    def start_peak(self) -> None:
        """Starts the search for the peak anew from the bytes that are live now."""
        self.peak, self._at_peak, self._peak_place = self.live, None, self.place

    def relabel(self, tensors: Iterable[Tensor], category: str) -> None:
        """Puts the storages of `tensors` into a category, whatever was active when they were allocated."""
        for tensor in tensors:
            allocation = self._allocations.get(tensor.untyped_storage()._cdata)
            if allocation is not None:
                self.by_label[allocation.label] -= allocation.bytes
                allocation.label = (category, "")
                self.by_label[allocation.label] += allocation.bytes

    def relabel_live(self, old: str, new: str) -> None:
        """Moves all live storages of a category into another one."""
        for allocation in self._allocations.values():
            if allocation.label[0] == old:
                self.by_label[allocation.label] -= allocation.bytes
                allocation.label = (new, allocation.label[1])
                self.by_label[allocation.label] += allocation.bytes

    def categories(self) -> Counter[str]:
        """Live bytes by category."""
        return by_category(self.by_label)


def by_category(labels: Counter[Label]) -> Counter[str]:
    """Sums the bytes of all modules of a category."""
    sums: Counter[str] = Counter()
    for (category, _), size in labels.items():
        sums[category] += size
    return sums
