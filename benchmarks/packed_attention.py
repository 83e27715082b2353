"""Compares methods for attention within packed documents: forward and backward, in one process, in turns.

    python benchmarks/packed_attention.py --threads 1 --out benchmarks/results/packed-attention-cpu.md
    python benchmarks/packed_attention.py --device cuda --dtypes bf16 --heads 32 --head-dim 128 --rows 4

- `documents`: this project's: torch's SDPA on one document after the other.
- `kernel`: the device's variable-length kernel.
- `grouped`: SDPA on documents of similar lengths at once, padded to multiples of 64.
- `block mask`: one SDPA call with an s x s mask that hides the other documents.
- `whole row`: one causal SDPA call over the row. A different function, as documents see those before them:
  the cost of packing without masks.

The result is the ratio of neighbouring runs, other method / `documents`: above 1 this project is faster. All
but `whole row` must give the same values.
"""

import datetime
import math
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from clock import Timing, timed

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

SAME = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest difference between the methods."""


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Device to run on."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Number formats."""
    seq_length: int = 2048
    """Tokens per row."""
    rows: int = 2
    """Rows per batch."""
    medians: tuple[int, ...] = (100, 250)
    """Median lengths of documents, distributed as in Alpaca: some are several times as long."""
    heads: int = 16
    """Query heads."""
    groups: int = 8
    """Key/value heads."""
    head_dim: int = 64
    """Size of a head."""
    rounds: int = 7
    """Measured runs of each method, after a warm-up run."""
    threads: int | None = None
    """CPU threads; None: torch's default. Use 1 on a shared machine."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


def draw(options: Options, median: int) -> tuple[tuple[int, ...], ...]:
    """Returns the document lengths of every row: log-normal with sigma 0.6; the rest of a row is padding."""
    import torch

    generator, rows = torch.Generator().manual_seed(median), []
    for _ in range(options.rows):
        row: list[int] = []
        while (left := options.seq_length - sum(row)) > 0:
            length = round(math.exp(math.log(median) + 0.6 * float(torch.randn((), generator=generator))))
            row.append(max(1, length) if length <= left else left)
        rows.append(tuple(row))
    return tuple(rows)


def ways(segments: Any, here: Any, dtype: str) -> dict[str, Callable]:
    """Returns method -> function of q [b, heads, s, d] and k, v [b, groups, s, d]."""
    import torch
    from torch.nn import functional as F

    from ascendspeed.distributed.training_kernels import fused_kernel
    from ascendspeed.models.gpt.attention import attend_packed

    begins = (segments.positions == 0).to(here.torch)
    ids, whole = begins.cumsum(1), segments.positions.size(1)
    seen = (ids[:, None, :, None] == ids[:, None, None]) & torch.ones(
        whole, whole, dtype=torch.bool, device=here.torch
    ).tril()
    takes, gives = groups_of([n for row in segments.lengths for n in row], here.torch)
    kernel = fused_kernel(here, "varlen") if dtype == "bf16" else None

    def flat(x: Any) -> Any:
        return x.transpose(1, 2).flatten(0, 1)

    def rows(x: Any) -> Any:
        return x.unflatten(0, (len(segments.lengths), -1)).transpose(1, 2)

    def grouped(q: Any, k: Any, v: Any) -> Any:
        qkv, out = [flat(x) for x in (q, k, v)], []
        for take in takes:
            part = (x[take.flatten()].unflatten(0, take.shape).transpose(1, 2) for x in qkv)
            out.append(
                F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
                .transpose(1, 2)
                .flatten(0, 1)
            )
        return rows(torch.cat(out)[gives])

    found = {
        "documents": lambda q, k, v: attend_packed(segments, q, k, v),
        "grouped": grouped,
        "block mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True),
        "whole row": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    if kernel:
        found["kernel"] = lambda q, k, v: rows(
            kernel.call(flat(q), flat(k), flat(v), segments.bounds(q.device))
        )
    return found


def groups_of(lengths: list[int], device: Any) -> tuple[list[Any], Any]:
    """Returns index tensors [documents, length] for each padded length, and for every token its place in
    their concatenation.
    """
    import torch

    sizes: dict[int, list[tuple[int, int]]] = {}
    begin = 0
    for n in lengths:
        sizes.setdefault(-(-n // 64) * 64, []).append((begin, n))
        begin += n
    takes, gives, taken = [], torch.empty(begin, dtype=torch.long), 0
    for size, documents in sizes.items():
        takes.append(
            torch.stack([torch.arange(size).clamp(max=n - 1) + first for first, n in documents]).to(device)
        )
        for first, n in documents:
            gives[first : first + n] = torch.arange(taken, taken + n)
            taken += size
    return takes, gives.to(device)


def measure(options: Options, here: Any) -> dict[tuple[str, int], tuple[int, dict[str, list[Timing]]]]:
    """Returns (dtype, median length) -> (number of documents, method -> its times)."""
    import torch

    from ascendspeed.models.gpt.packed_sequences import PackedSequences

    found = {}
    for dtype in options.dtypes:
        for median in options.medians:
            lengths = draw(options, median)
            positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
            took = turns(
                ways(PackedSequences(lengths=lengths, positions=positions), here, dtype), options, here, dtype
            )
            found[dtype, median] = sum(map(len, lengths)), took
            print(f"{dtype}, median {median}: {cells(took)}", flush=True)
    return found


def turns(calls: dict[str, Callable], options: Options, here: Any, dtype: str) -> dict[str, list[Timing]]:
    """Returns the times of each method. Raises UserError if two do not agree."""
    import torch

    from ascendspeed.models.gpt.layer_spec import DTYPES

    generator = torch.Generator().manual_seed(1)
    qkv = [  # in the model's memory layout: [s, b, heads, d], permuted
        torch.randn(options.seq_length, options.rows, heads, options.head_dim, generator=generator)
        .to(here.torch, DTYPES[dtype])
        .permute(1, 2, 0, 3)
        .requires_grad_()
        for heads in (options.heads, options.groups, options.groups)
    ]

    def both(call: Callable) -> Any:
        out = call(*qkv)
        torch.autograd.grad(out, qkv, torch.ones_like(out))
        return out.detach()

    took: dict[str, list[Timing]] = {name: [] for name in calls}
    values: dict[str, Any] = {}
    for number in range(options.rounds + 1):
        for name, call in list(calls.items())[:: 1 if number % 2 else -1]:
            values[name], one = timed(partial(both, call), here.synchronize)
            if number:
                took[name].append(one)
    for name in calls.keys() - {"documents", "whole row"}:
        off = float((values[name] - values["documents"]).abs().max())
        if not off < SAME[dtype]:
            raise UserError(f"{dtype}: {name} and documents differ by {off:.1e}; they cannot be compared")
    return took


def cells(took: dict[str, list[Timing]]) -> str:
    """Formats the milliseconds of `documents` and the ratio of each other method to it."""
    parts = [f"{1000 * statistics.median(one.wall for one in took['documents']):.1f}"]
    for name, turns in took.items():
        if name != "documents":
            ratios = sorted(
                other.wall / ours.wall for ours, other in zip(took["documents"], turns, strict=True)
            )
            cpu = statistics.median(
                other.cpu / ours.cpu for ours, other in zip(took["documents"], turns, strict=True)
            )
            parts.append(
                f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f}; {cpu:.2f})"
            )
    return " | ".join(parts)


def report(
    found: dict[tuple[str, int], tuple[int, dict[str, list[Timing]]]], options: Options, here: Any
) -> str:
    """Formats the markdown file."""
    import torch

    (_, first), *_ = found.values()
    names = " | ".join(f"{name} / documents" for name in first if name != "documents")
    lines = [
        f"| {dtype} | {median} | {documents} | {cells(took)} |"
        for (dtype, median), (documents, took) in found.items()
    ]
    load = os.getloadavg()[0]
    return (
        f"# Attention within packed documents\n\n{datetime.date.today()}, {here.name}, {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads, load {load:.0f} with that of others; Python "
        f"{platform.python_version()}, torch {version('torch')}.\n\n{options.rows} rows of "
        f"{options.seq_length} tokens, {options.heads} heads, {options.groups} of keys and values, of "
        f"{options.head_dim}; values and gradients; {options.rounds} rounds in turns, medians. Milliseconds "
        "of `documents`; of the other ways the ratio to it, with least and largest, then that of CPU time. "
        "Above 1 ours is faster. All but `whole row`, where documents see those before them, gave the same "
        "values.\n\n"
        f"| type | median length | documents | documents, ms | {names} |\n|{'---|' * (3 + len(first))}\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    from ascendspeed.distributed import device as devices

    here = devices.prepare(options.device)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    text = report(measure(options, here), options, here)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
