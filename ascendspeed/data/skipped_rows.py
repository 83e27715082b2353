"""Rows that gave no document: counts by kind, and the first few examples of each kind by file and line."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ascendspeed.data.document import Fault
from ascendspeed.data.readers import registry

MAX_EXAMPLES = 3


@dataclass(frozen=True)
class FileLocation:
    """A row of a file that is read in order; lines are counted only when the location is shown."""

    path: Path
    offset: int
    """Location in the file, as its `FileReader` defines it."""

    def __str__(self) -> str:
        return f"{self.path}, {registry.describe_location(self.path, self.offset)}"


@dataclass(frozen=True)
class SkippedRow:
    """A row that gave no document."""

    fault: Fault
    location: FileLocation | str
    """File and line or row."""

    def __str__(self) -> str:
        return f"{self.location}: {self.fault.detail or self.fault.kind}"


@dataclass
class SkippedRows:
    """Skipped rows of a part of the input, in its order."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[SkippedRow]] = field(default_factory=dict)
    """Kind -> the first `MAX_EXAMPLES` rows."""
    first: SkippedRow | None = None

    def add(self, rows: Iterable[SkippedRow]) -> list[SkippedRow]:
        """Appends rows; returns those that became examples."""
        new_examples = []
        for row in rows:
            self.first = self.first or row
            self.counts[row.fault.kind] += 1
            examples = self.examples.setdefault(row.fault.kind, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(row)
                new_examples.append(row)
        return new_examples

    def update(self, following: "SkippedRows") -> None:
        """Appends the rows of the next part of the input."""
        self.counts.update(following.counts)
        for kind, rows in following.examples.items():
            examples = self.examples.setdefault(kind, [])
            examples += rows[: MAX_EXAMPLES - len(examples)]
        self.first = self.first or following.first

    def summary(self) -> str:
        """Counts, `12 empty, 3 null`; empty if no row was skipped."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))

    def lines(self) -> list[str]:
        """Log lines with the examples, kind by kind."""
        lines = []
        for kind, count in sorted(self.counts.items()):
            examples = self.examples[kind]
            lines += [f"skipped, {kind}: {row}" for row in examples]
            if count > len(examples):
                lines.append(f"skipped, {kind}: ... and {count - len(examples):,} more")
        return lines
