"""Compares the planner's peak with what torch's allocator hands out in the same steps on real tensors.

python benchmarks/planner_accuracy.py --out benchmarks/results/planner-accuracy.md [--case NAME ...]

One process executes one rank; collectives exchange nothing, but allocate what they allocate. Every case also
runs with a deliberate mistake: one layer runs twice, so that its activations are kept twice, or, under
recomputation, it is left out of it. The comparison must detect it.
"""

import gc
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from inspect import getclosurevars
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.atomic import write_file

SIZES = "--seq-length 256 --micro-batch-size 2 --num-layers 4"
TINY, TINY2 = "--model internlm-tiny", "--model internlm2-tiny"
FULL = "--recompute-granularity full"
NF4 = "--ffn-hidden-size 384 --lora-rank 8 --quantization-bit 4"
CASES = {
    "Megatron": (1, 0, f"{TINY} --bf16"),
    "Megatron, fp32": (1, 0, TINY),
    "Megatron, full recomputation": (1, 0, f"{TINY} --bf16 {FULL}"),
    "Megatron, block recomputation": (
        1,
        0,
        f"{TINY} --bf16 {FULL} --recompute-method block --recompute-num-layers 2",
    ),
    "distributed optimizer, DP 2": (2, 0, f"{TINY} --bf16 --use-distributed-optimizer"),
    "TP 2, SP": (2, 0, f"{TINY2} --bf16 --tp 2 --sequence-parallel"),
    "PP 2, first stage": (2, 0, f"{TINY2} --bf16 --pp 2 --global-batch-size 8"),
    "PP 2, last stage": (2, 1, f"{TINY2} --bf16 --pp 2 --global-batch-size 8"),
    "PP 2 x VPP 2": (2, 0, f"{TINY2} --bf16 --pp 2 --vpp 2 --global-batch-size 8"),
    "CP 2": (2, 0, f"{TINY2} --bf16 --cp 2"),
    "EP 2": (2, 0, "--model mixtral-tiny --bf16 --ep 2"),
    "ZeRO-0, fp32": (2, 0, f"{TINY} --deepspeed --zero-stage 0"),
    "ZeRO-1": (2, 0, f"{TINY} --bf16 --deepspeed --zero-stage 1"),
    "ZeRO-2": (2, 0, f"{TINY} --bf16 --deepspeed --zero-stage 2"),
    "ZeRO-2, full recomputation, 8 samples": (
        2,
        0,
        f"{TINY} --bf16 --deepspeed --zero-stage 2 {FULL} --micro-batch-size 8",
    ),
    "ZeRO-2, TP 2, SP": (4, 0, f"{TINY2} --bf16 --deepspeed --zero-stage 2 --tp 2 --sequence-parallel"),
    "ZeRO-3": (2, 0, f"{TINY} --bf16 --deepspeed --zero-stage 3"),
    "LoRA, ZeRO-2": (2, 0, f"{TINY2} --bf16 --deepspeed --zero-stage 2 --lora-rank 8"),
    "QLoRA, int8": (1, 0, f"{TINY2} --bf16 --lora-rank 8 --quantization-bit 8"),
    "QLoRA, NF4": (1, 0, f"{TINY2} --bf16 {NF4}"),
    "QLoRA, NF4, ZeRO-2, TP 2, SP": (
        4,
        0,
        f"{TINY2} --bf16 --deepspeed --zero-stage 2 --tp 2 --sequence-parallel {NF4}",
    ),
    "masters in 16 bits": (1, 0, f"{TINY} --bf16 --store-param-remainders"),
    "masters in 16 bits, distributed optimizer": (
        2,
        0,
        f"{TINY} --bf16 --store-param-remainders --use-distributed-optimizer",
    ),
    "InternLM3": (1, 0, "--model internlm3-tiny --bf16"),
    "Gemma": (1, 0, "--model gemma-tiny --bf16"),
    "Baichuan2": (1, 0, "--model baichuan2-tiny --bf16"),
    "Qwen2": (1, 0, "--model qwen2-tiny --bf16"),
}
"""Name -> (processes, rank, flags that follow `SIZES`)."""


@dataclass(frozen=True)
class Options:
    """Flags of planner_accuracy.py."""

    case: tuple[str, ...] = ()
    """Cases to run; default: all."""
    out: Annotated[str | None, parser.output_flag("out")] = None
    """File to write the table to, beside printing it; its rows of other cases are kept."""
    json: bool = False
    """Print the numbers as JSON."""


def compare(name: str, device: Any) -> dict[str, int]:
    """Bytes at the peak: planned, allocated, and allocated with the mistake."""
    from ascendspeed.planning import command
    from ascendspeed.planning.allocator_events import allocator_peak
    from ascendspeed.planning.memory_plan import plan_rank

    devices, rank, words = CASES[name]
    _, run, _ = command.resolve([*SIZES.split(), *words.split(), "--devices", str(devices)])
    sizes = {"planned": plan_rank(run, devices, rank, device, "cpu").peak}
    wrong = one_layer_kept if FULL in words else one_layer_twice
    for key, mistake in (("allocated", nullcontext), ("mistake", wrong)):
        gc.collect()
        with mistake(), allocator_peak() as measured:
            plan_rank(run, devices, rank, device, "cpu", fake=False)
        sizes[key] = measured.peak
    return sizes


@contextmanager
def one_layer_twice() -> Iterator[None]:
    """The first layer of every stage runs twice, and the activations of both passes are kept."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    forward = TransformerLayer.forward
    firsts: set[int] = set()

    def twice(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if not firsts:
            firsts.add(id(self))
        out = forward(self, hidden_states, *args, **kwargs)
        if id(self) in firsts:
            again = forward(self, hidden_states, *args, **kwargs)
            return (out[0] + 0 * again[0], *out[1:]) if isinstance(out, tuple) else out + 0 * again
        return out

    with patch.object(TransformerLayer, "forward", twice):
        yield


@contextmanager
def one_layer_kept() -> Iterator[None]:
    """The first layer of every stage keeps its activations instead of being recomputed."""
    from megatron.core import tensor_parallel

    checkpoint = tensor_parallel.checkpoint

    def kept(function: Any, distribute: bool, *args: Any) -> Any:
        if getclosurevars(function).nonlocals["start"] == 0:
            return function(*args)
        return checkpoint(function, distribute, *args)

    with patch.object(tensor_parallel, "checkpoint", kept):
        yield


def row(name: str, sizes: dict[str, int]) -> str:
    """Line of the table."""
    planned, allocated, mistake = (sizes[key] / 2**20 for key in ("planned", "allocated", "mistake"))
    return (
        f"| {name} | {planned:.2f} | {allocated:.2f} | {planned / allocated - 1:+.2%} | "
        f"{planned / mistake - 1:+.2%} |"
    )


def table(rows: dict[str, str]) -> str:
    """Markdown table; name of a case -> its line."""
    lines = [
        "# Planner: planned peak and torch's allocator",
        "",
        f"CPU ({platform.machine()}), torch {version('torch')}, one process executes one rank of a layout; "
        f"{SIZES}. MiB at the peak of the whole run. The last column compares "
        "the plan with a run whose first layer runs twice; with recomputation, with a run that keeps that "
        "layer's activations.",
        "",
        "| case | planned | allocated | difference | control |",
        "|---|---|---|---|---|",
        *(rows[name] for name in CASES if name in rows),
    ]
    return "\n".join(lines) + "\n"


def rows_of(path: Path) -> dict[str, str]:
    """Lines of a table that was written before, by case."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    return {name: cells[name] for name in CASES if name in cells}


def main() -> None:
    """Runs the cases and prints the table."""
    options = parser.parse(Options, description=__doc__ or "")
    if unknown := set(options.case) - set(CASES):
        raise errors.UserError(f"--case {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    from ascendspeed.distributed import device as devices

    device = devices.prepare("cpu")
    results = {}
    for name in options.case or CASES:
        results[name] = compare(name, device)
        if not options.json:
            print(name, results[name], flush=True)
    rows = {name: row(name, sizes) for name, sizes in results.items()}
    print(json.dumps(results) if options.json else table(rows))
    if options.out:
        write_file(Path(options.out), table(rows_of(Path(options.out)) | rows))


if __name__ == "__main__":
    errors.run(main)
