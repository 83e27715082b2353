"""Text and JSON of a plan. No torch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ascendspeed.config.schema import Run
from ascendspeed.models import estimates
from ascendspeed.planning.command import PlanOptions
from ascendspeed.planning.device_table import rates_of
from ascendspeed.planning.search import Fitting, command_line
from ascendspeed.planning.time_estimate import TimeEstimate

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


def estimate_lines(run: Run, time: TimeEstimate, options: PlanOptions) -> list[str]:
    """Sentences on time, FLOPs and checkpoints."""
    rates = rates_of(options.device_type)
    parts = {
        "computation": time.compute,
        "exchange": time.exchange,
        "replicas": time.replicas,
        "bubble": time.bubble,
        "update": time.update,
    }
    shares = ", ".join(f"{name} {seconds / time.step:.0%}" for name, seconds in parts.items() if seconds)
    size = estimates.checkpoint_bytes(run.model, run.lora)
    return [
        f"estimate for {rates.name}, not measured: {time.step:.2f} s per step ({shares}); "
        f"{time.tokens_per_s:,.0f} tokens/s per device, MFU {time.mfu:.0%}",
        f"rates: {rates.source}",
        f"model FLOPs: {time.model_flops:.3g} per step; checkpoint: {size / GIB:.1f} GiB, "
        f"{size / (options.save_gb_s * 1e9):.0f} s at {options.save_gb_s:g} GB/s",
    ]


def as_json(plan: Any, time: TimeEstimate, options: PlanOptions) -> dict[str, Any]:
    """The plan as JSON values; sizes are bytes, times seconds."""
    memory = options.device_memory
    return {
        "devices": plan.devices,
        "run": dataclasses.asdict(plan.run),
        "ranks": [dataclasses.asdict(rank) for rank in plan.ranks],
        "peak": plan.peak,
        "fits": None if memory is None else plan.peak <= memory * GIB,
        "estimate": time_json(time),
        "checkpoint": estimates.checkpoint_bytes(plan.run.model, plan.run.lora),
    }


def time_json(time: TimeEstimate) -> dict[str, float]:
    """The estimate as JSON values."""
    derived = {"step": time.step, "tokens_per_s": time.tokens_per_s, "mfu": time.mfu}
    return dataclasses.asdict(time) | derived


def search_text(fitting: Sequence[Fitting], words: Sequence[str], options: PlanOptions) -> str:
    """Table of the layouts, and the command of each."""
    if not fitting:
        return f"none fits into {options.device_memory:g} GiB: use more devices, or more memory"
    rows = [("", "peak GiB", "tokens/s per device (estimate)", "MFU", "layout")]
    commands = []
    for number, found in enumerate(fitting, 1):
        time = found.candidate.time
        numbers = f"{found.peak / GIB:.2f}", f"{time.tokens_per_s:,.0f}", f"{time.mfu:.0%}"
        rows.append((str(number), *numbers, " ".join(found.candidate.flags)))
        commands += ["", f"{number}:", command_line(found.candidate, words, options.devices)]
    return "\n".join([aligned(rows), *commands])


def search_json(
    fitting: Sequence[Fitting], words: Sequence[str], options: PlanOptions
) -> list[dict[str, Any]]:
    """The layouts as JSON values."""
    return [
        {
            "flags": [*words, *found.candidate.flags],
            "environment": found.candidate.environment,
            "command": command_line(found.candidate, words, options.devices),
            "peak": found.peak,
            "estimate": time_json(found.candidate.time),
        }
        for found in fitting
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns of equal width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
