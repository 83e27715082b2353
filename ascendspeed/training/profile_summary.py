"""Time of profiled iterations by kind, from the traces of torch.profiler."""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.utils.atomic import write_file

FOLDER = "profile"
"""Folder in --log-dir."""
SUMMARY_NAME = "summary.json"
ITERATION, DATA = "intern: iteration", "intern: data"
"""Names of the ranges that the training loop marks."""
OPTIMIZER = "Optimizer.step#"
OPERATIONS = ("aten::", "mkldnn::", "onednn::")
"""First words of operations of the CPU; what surrounds them, such as a backward function, may wait."""
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of work on a device; without any, the operations of the CPU are the work."""
Spans = list[tuple[float, float]]
"""Disjoint intervals (begin, end) in ascending order, in microseconds."""


@dataclass(frozen=True)
class RankTimes:
    """Milliseconds per iteration of one rank; the kinds add up to `total`."""

    rank: int
    total: float
    compute: float
    """Operations that no other kind has: forward and backward."""
    communication: float
    """Collectives, as far as no computation runs beside them, without the time they wait."""
    waiting: float
    """Collectives beyond the time of the fastest rank: waiting for ranks that come later."""
    data: float
    """Preparing the batches."""
    optimizer: float
    """The optimizer's update."""
    other: float
    """Python, launches and synchronisation."""

    @property
    def busy(self) -> float:
        """Time in which the rank works by itself."""
        return self.total - self.communication - self.waiting


@dataclass(frozen=True)
class TraceTimes:
    """Measurement of one trace, before ranks are compared. Microseconds."""

    rank: int
    iterations: int
    total: float
    compute: float
    exposed: float
    """Collectives beside which nothing is computed."""
    data: float
    optimizer: float
    collectives: list[float]
    """Exposed time of each collective, in order."""


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Reads the events of a trace, plain or compressed."""
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rb") as file:
        return json.load(file)["traceEvents"]


def measure(rank: int, events: Iterable[Mapping[str, Any]], collective_names: tuple[str, ...]) -> TraceTimes:
    """Adds up the time of the iterations in a trace by kind.

    `collective_names`: first words of the events of a collective.
    """
    timed = [event for event in events if event.get("ph") == "X" and event.get("cat") != "Trace"]
    iterations = _spans(timed, lambda event: event["name"] == ITERATION and event["cat"] == "user_annotation")
    has_device = any(event.get("cat") in DEVICE_WORK for event in timed)
    range_kind = "gpu_user_annotation" if has_device else "user_annotation"
    collectives = [
        (event["ts"], event["ts"] + event["dur"])
        for event in sorted(timed, key=lambda event: event["ts"])
        if event["name"].startswith(collective_names)
        and (event.get("cat") in DEVICE_WORK if has_device else event.get("cat") != "cpu_op")
    ]
    data = _spans(timed, lambda event: event["name"] == DATA and event["cat"] == "user_annotation")
    ranges = _spans(timed, lambda event: event["name"].startswith(OPTIMIZER) and event["cat"] == range_kind)
    others = [event for event in timed if not event["name"].startswith(collective_names)]
    work = _spans(others, _is_device_work if has_device else _is_operation)
    data = _common(data, iterations)
    optimizer = _without(_common(_common(ranges, work), iterations), data)
    compute = _without(_without(_common(work, iterations), data), optimizer)
    taken = _merge([*data, *optimizer, *compute])
    own = [_length(_without(_common([span], iterations), taken)) for span in collectives]
    exposed = _without(_common(_merge(collectives), iterations), taken)
    return TraceTimes(
        rank,
        len(iterations),
        _length(iterations),
        _length(compute),
        _length(exposed),
        _length(data),
        _length(optimizer),
        own,
    )


def compare(traces: Sequence[TraceTimes]) -> list[RankTimes]:
    """Splits the communication of every rank into work and waiting.

    The fastest rank of a collective came last and waited for none; what others spend beyond its time is
    waiting. Ranks with different numbers of collectives, as pipeline stages have, are not comparable: nothing
    counts as waiting.
    """
    counts = {len(trace.collectives) for trace in traces}
    fastest = np.min([trace.collectives for trace in traces], axis=0) if len(counts) == 1 else None
    times = []
    for trace in traces:
        own = float(np.sum(trace.collectives))
        waiting = 0.0
        if fastest is not None and own:
            waiting = (own - float(np.sum(fastest))) * trace.exposed / own
        scale = 1 / max(1, trace.iterations) / 1e3
        other = trace.total - trace.compute - trace.exposed - trace.data - trace.optimizer
        parts = [trace.total, trace.compute, trace.exposed - waiting, waiting, trace.data, trace.optimizer]
        times.append(RankTimes(trace.rank, *(value * scale for value in (*parts, other))))
    return times


def slowest(times: Sequence[RankTimes]) -> RankTimes:
    """Rank for which the others wait: the one that works longest by itself."""
    return max(times, key=lambda rank: rank.busy)


def as_text(times: Sequence[RankTimes], iterations: str) -> str:
    """Table of the ranks, with the slowest one."""
    kinds = ("total", "compute", "communication", "waiting", "data", "optimizer", "other")
    lines = [f"profile of iterations {iterations}, ms per iteration"]
    lines.append("  rank " + " ".join(f"{kind:>13}" for kind in kinds))
    for rank in times:
        lines.append(f"  {rank.rank:4} " + " ".join(f"{getattr(rank, kind):13.1f}" for kind in kinds))
    last = slowest(times)
    if len(times) > 1:
        lines.append(f"  slowest: rank {last.rank}, which works {last.busy:.1f} ms by itself")
    return "\n".join(lines)


def write_summary(folder: Path, times: Sequence[RankTimes], iterations: str) -> None:
    """Writes the summary that the page of the run reads."""
    table = {
        "iterations": iterations,
        "slowest": slowest(times).rank,
        "ranks": [asdict(rank) for rank in times],
    }
    write_file(folder / SUMMARY_NAME, json.dumps(table, indent=1) + "\n")


def _is_device_work(event: Mapping[str, Any]) -> bool:
    return event.get("cat") in DEVICE_WORK


def _is_operation(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "cpu_op" and event["name"].startswith(OPERATIONS)


def _spans(events: Iterable[Mapping[str, Any]], is_chosen: Any) -> Spans:
    return _merge([(event["ts"], event["ts"] + event["dur"]) for event in events if is_chosen(event)])


def _merge(spans: Iterable[tuple[float, float]]) -> Spans:
    """Union of intervals."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _common(first: Spans, second: Spans) -> Spans:
    """Intersection of two lists of disjoint intervals."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if begin < end:
            common.append((begin, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def _without(spans: Spans, removed: Spans) -> Spans:
    """Parts of `spans` that no interval of `removed` covers."""
    if not spans:
        return []
    edge = max(spans[-1][1], removed[-1][1] if removed else spans[-1][1]) + 1
    borders = [spans[0][0] - 1, *(edge for span in removed for edge in span), edge]
    gaps = [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]
    return _common(spans, gaps)


def _length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)
