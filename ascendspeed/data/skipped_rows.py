"""Rows that made no document: counted by kind, and the first few of each kind by file and line."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ascendspeed.data.document import Fault
from ascendspeed.data.readers import registry

SHOWN = 3


@dataclass(frozen=True)
class SkippedRow:
    """One such row."""

    path: Path
    place: int
    fault: Fault

    @property
    def where(self) -> str:
        """File and line or row."""
        return f"{self.path}, {registry.describe_location(self.path, self.place)}"

    def __str__(self) -> str:
        return f"{self.where}: {self.fault.detail or self.fault.kind}"


@dataclass
class SkippedRows:
    """Those of a part of the input, in its order."""

    counts: Counter[str] = field(default_factory=Counter)
    seen: dict[str, list[SkippedRow]] = field(default_factory=dict)
    """Kind -> the first `SHOWN` of it."""
    first: SkippedRow | None = None

    def add(self, found: Iterable[SkippedRow]) -> None:
        """More, that come after these."""
        for one in found:
            kind = one.fault.kind
            self.counts[kind] += 1
            if len(kept := self.seen.setdefault(kind, [])) < SHOWN:
                kept.append(one)
            self.first = self.first or one

    def update(self, others: "SkippedRows") -> None:
        """Those of the next part."""
        self.counts.update(others.counts)
        for kind, found in others.seen.items():
            kept = self.seen.setdefault(kind, [])
            kept += found[: SHOWN - len(kept)]
        self.first = self.first or others.first

    def said(self) -> str:
        """The counts: `12 empty, 3 null`; empty when there are none."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))

    def lines(self) -> list[str]:
        """The rows themselves, kind by kind."""
        found = []
        for kind, count in sorted(self.counts.items()):
            kept = self.seen[kind]
            found += [f"skipped, {kind}: {one}" for one in kept]
            found += [f"skipped, {kind}: ... and {count - len(kept):,} more"] if count > len(kept) else []
        return found
