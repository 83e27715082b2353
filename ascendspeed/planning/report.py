"""Text and JSON of a plan. No torch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

GIB = 2**30
COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "working")


def memory_table(plan: Any) -> str:
    """GiB at the peak of every rank that differs, by category."""
    rows = [("rank", *COLUMNS, "peak")]
    for rank in plan.ranks:
        sizes = [rank.at_peak[name] for name in COLUMNS]
        rows.append((str(rank.rank), *(f"{size / GIB:.2f}" for size in [*sizes, rank.peak])))
    return aligned(rows)


def verdict(plan: Any, device_memory: float | None) -> str:
    """Sentence on the largest rank, and whether it fits."""
    worst = max(plan.ranks, key=lambda rank: rank.peak)
    text = f"peak: {worst.peak / GIB:.2f} GiB on rank {worst.rank}, at: {worst.place}"
    if device_memory is None:
        return text
    missing = worst.peak / GIB - device_memory
    fits = f"fits into {device_memory:g} GiB" if missing <= 0 else f"does not fit: {missing:.2f} GiB too much"
    return f"{text}; {fits}"


def as_json(plan: Any, device_memory: float | None) -> dict[str, Any]:
    """The plan as JSON values; sizes are bytes."""
    return {
        "devices": plan.devices,
        "run": dataclasses.asdict(plan.run),
        "ranks": [dataclasses.asdict(rank) for rank in plan.ranks],
        "peak": plan.peak,
        "fits": None if device_memory is None else plan.peak <= device_memory * GIB,
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns of equal width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
