"""Compares the planner's peak with what torch's allocator hands out in the same steps on real tensors.

python benchmarks/planner_accuracy.py --out benchmarks/results/planner-accuracy.md [--case NAME ...]

One process executes one rank; collectives exchange nothing, but allocate what they allocate. Every case also
runs with a deliberate mistake: one layer runs twice, so that its activations are kept twice. The comparison
must detect it.
"""

import gc
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.atomic import write_file

SIZES = "--seq-length 256 --micro-batch-size 2 --num-layers 4"
CASES = {
    "Megatron": (1, 0, "--model internlm-tiny --bf16"),
    "Megatron, fp32": (1, 0, "--model internlm-tiny"),
    "Megatron, full recomputation": (1, 0, "--model internlm-tiny --bf16 --recompute-granularity full"),
    "Megatron, block recomputation": (
        1,
        0,
        "--model internlm-tiny --bf16 --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 2",
    ),
    "distributed optimizer, DP 2": (2, 0, "--model internlm-tiny --bf16 --use-distributed-optimizer"),
    "TP 2, SP": (2, 0, "--model internlm2-tiny --bf16 --tp 2 --sequence-parallel"),
    "PP 2, first stage": (2, 0, "--model internlm2-tiny --bf16 --pp 2 --global-batch-size 8"),
    "PP 2, last stage": (2, 1, "--model internlm2-tiny --bf16 --pp 2 --global-batch-size 8"),
    "PP 2 x VPP 2": (2, 0, "--model internlm2-tiny --bf16 --pp 2 --vpp 2 --global-batch-size 8"),
    "CP 2": (2, 0, "--model internlm2-tiny --bf16 --cp 2"),
    "EP 2": (2, 0, "--model mixtral-tiny --bf16 --ep 2"),
    "ZeRO-0, fp32": (2, 0, "--model internlm-tiny --deepspeed --zero-stage 0"),
    "ZeRO-1": (2, 0, "--model internlm-tiny --bf16 --deepspeed --zero-stage 1"),
    "ZeRO-2": (2, 0, "--model internlm-tiny --bf16 --deepspeed --zero-stage 2"),
    "ZeRO-2, full recomputation": (
        2,
        0,
        "--model internlm-tiny --bf16 --deepspeed --zero-stage 2 --recompute-granularity full",
    ),
    "ZeRO-2, TP 2, SP": (
        4,
        0,
        "--model internlm2-tiny --bf16 --deepspeed --zero-stage 2 --tp 2 --sequence-parallel",
    ),
    "ZeRO-3": (2, 0, "--model internlm-tiny --bf16 --deepspeed --zero-stage 3"),
    "LoRA, ZeRO-2": (2, 0, "--model internlm2-tiny --bf16 --deepspeed --zero-stage 2 --lora-rank 8"),
    "InternLM3": (1, 0, "--model internlm3-tiny --bf16"),
    "Gemma": (1, 0, "--model gemma-tiny --bf16"),
    "Baichuan2": (1, 0, "--model baichuan2-tiny --bf16"),
    "Qwen2": (1, 0, "--model qwen2-tiny --bf16"),
}
"""Name -> (processes, rank, flags)."""


@dataclass(frozen=True)
class Options:
    """Flags of planner_accuracy.py."""

    case: tuple[str, ...] = ()
    """Cases to run; default: all."""
    out: Annotated[str | None, parser.output_flag("out")] = None
    """File to write the table to, beside printing it."""
    json: bool = False
    """Print the numbers as JSON."""


def compare(name: str, device: Any) -> dict[str, float]:
    """Bytes at the peak: planned, allocated, and allocated with the mistake."""
    from ascendspeed.planning import command, fake_step, memory_plan
    from ascendspeed.planning.allocator_events import allocator_peak

    devices, rank, words = CASES[name]
    _, run, _ = command.resolve([*words.split(), *SIZES.split(), "--devices", str(devices)])
    planned = memory_plan.plan_rank(run, devices, rank, device, "cpu").peak
    sizes = {"planned": planned}
    for key, mistake in (("allocated", nullcontext), ("mistake", one_layer_twice)):
        gc.collect()
        with mistake(), allocator_peak() as measured:
            build = memory_plan.builder(device, memory_plan.kernels_of(run, "cpu"))
            fake_step.measure(run, device, devices, rank, build, fake=False)
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


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown table of the results."""
    lines = [
        "# Planner: planned peak and torch's allocator",
        "",
        f"CPU ({platform.machine()}), one process executes one rank of each layout; {SIZES}. MiB at the "
        "peak of the whole run.",
        "",
        "| case | planned | allocated | difference | one layer twice (control) |",
        "|---|---|---|---|---|",
    ]
    for name, sizes in results.items():
        planned, allocated, mistake = (sizes[key] / 2**20 for key in ("planned", "allocated", "mistake"))
        lines.append(
            f"| {name} | {planned:.2f} | {allocated:.2f} | {planned / allocated - 1:+.2%} | "
            f"{planned / mistake - 1:+.2%} |"
        )
    return "\n".join(lines) + "\n"


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
    text = table(results)
    print(json.dumps(results) if options.json else text)
    if options.out:
        write_file(Path(options.out), text)


if __name__ == "__main__":
    errors.run(main)
