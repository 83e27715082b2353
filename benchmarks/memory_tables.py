"""Writes the tables of memory in docs/memory.md and docs/parallel.md, in both languages, by the planner.

python benchmarks/memory_tables.py --update [--model NAME ...]   plans, keeps the sizes, writes the tables
python benchmarks/memory_tables.py                               writes the tables from the kept sizes

Sizes are kept in results/memory-tables.json, so that the cases can be planned in several runs; those that are
not planned yet are a dash. Everything is planned for the kernels of an accelerator; nothing was measured on
one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ascendspeed.cli import parser
from ascendspeed.config.schema import ParallelConfig
from ascendspeed.models import estimates
from ascendspeed.models.families import PRESETS
from ascendspeed.planning import command
from ascendspeed.utils import errors
from ascendspeed.utils.atomic import write_file

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "memory-tables.json"
GIB = 2**30
LENGTH = 2048
"""Tokens of a sample."""

SIZES = (
    "internlm2-1.8b",
    "internlm-7b",
    "internlm2-7b",
    "internlm3-8b",
    "internlm-20b",
    "internlm2-20b",
    "internlm-65b",
)
STATES = tuple(
    (model, title, devices, tp)
    for model, title, devices, sizes in (
        ("internlm-7b", "InternLM-7B", 8, (1, 2, 8)),
        ("internlm-20b", "InternLM-20B", 8, (1, 2, 8)),
        ("internlm-65b", "InternLM-65B", 32, (1, 4, 8)),
    )
    for tp in sizes
)
"""(model, its name in the table, devices, tensor-parallel size)."""
STAGES = (1, 2, 3)
PLANNED = "internlm-7b"
"""Model of `STATES` whose peaks are planned too."""
TP, PP, SP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel"
LAYOUTS = (
    ("internlm2-1.8b", 8, "--deepspeed --zero-stage 1"),
    ("internlm-7b", 8, "--deepspeed --zero-stage 2"),
    ("internlm2-7b", 8, "--deepspeed --zero-stage 2"),
    ("internlm3-8b", 8, "--deepspeed --zero-stage 3"),
    ("internlm-20b", 8, "--deepspeed --zero-stage 3"),
    ("internlm-20b", 8, f"{TP} 4 {PP} 2 {SP}"),
    ("internlm2-20b", 16, f"{TP} 8 {SP} --use-distributed-optimizer"),
    ("internlm-65b", 32, "--deepspeed --zero-stage 3"),
    ("internlm-65b", 32, f"{TP} 8 {PP} 4 {SP}"),
    ("internlm-65b", 64, f"{TP} 8 {PP} 4 {SP} --use-distributed-optimizer"),
)
COMMON = "--bf16 --global-batch-size 256"
RECOMPUTED = "--recompute-granularity full"


def _sample(model: str) -> str:
    return _layout(model, 1, "", 1)


def _sharded(tp: int, stage: int) -> str:
    return f"--deepspeed --zero-stage {stage}" + (f" {TP} {tp} {SP}" if tp > 1 else "")


def _layout(model: str, devices: int, flags: str, samples: int = 2) -> str:
    return " ".join(f"--model {model} --devices {devices} {flags} --micro-batch-size {samples}".split())


def cases() -> list[str]:
    """Flags of every plan, small models first."""
    layouts = [_layout(*row) for row in LAYOUTS]
    words = [_sample(model) for model in SIZES]
    words += [line + more for line in layouts for more in ("", f" {RECOMPUTED}")]
    words += [
        _layout(model, devices, _sharded(tp, stage), 1)
        for model, _, devices, tp in STATES
        if model == PLANNED
        for stage in STAGES
    ]
    return sorted(dict.fromkeys(words), key=lambda line: estimates.parameter_count(PRESETS[line.split()[1]]))


def plan(case: str, device: Any) -> dict[str, int]:
    """`sizes_of` a case; `device` is the prepared CPU."""
    from ascendspeed.planning import memory_plan

    options, run, _ = command.resolve([*case.split(), *COMMON.split()])
    ranks = memory_plan.plan_memory(run, options.devices, device).ranks
    return sizes_of([asdict(rank) for rank in ranks])


def sizes_of(ranks: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Bytes of the rank that needs most: model states between two steps, activations at the peak, the
    peak."""
    worst = max(ranks, key=lambda rank: rank["peak"])
    states = sum(worst["persistent"][name] for name in ("weights", "gradients", "optimizer"))
    return {"states": states, "activations": worst["at_peak"]["activations"], "peak": worst["peak"]}


def bodies(sizes: dict[str, dict[str, int]]) -> dict[str, list[list[str]]]:
    """First cell of a table -> its rows."""

    def gib(case: str, name: str) -> str:
        return f"{sizes[case][name] / GIB:.1f}" if case in sizes else "–"

    rows = []
    for model in SIZES:
        preset = PRESETS[model]
        states = [
            " / ".join(_states(model, devices, _sharded(1, stage)) for stage in STAGES) for devices in (8, 32)
        ]
        inputs = 2 * LENGTH * preset.hidden_size * preset.num_layers / GIB
        count = estimates.parameter_count(preset) / 1e9
        disk = estimates.checkpoint_bytes(preset) / GIB
        numbers = [
            f"{count:.2f}",
            f"{disk:.0f}",
            *states,
            gib(_sample(model), "activations"),
            f"{inputs:.2f}",
        ]
        rows.append([model, *numbers])
    layouts = [
        [
            f"`{model}`, {devices}",
            f"`{flags}`",
            _states(model, devices, flags),
            gib(case := _layout(model, devices, flags), "activations"),
            gib(case, "peak"),
            gib(f"{case} {RECOMPUTED}", "peak"),
        ]
        for model, devices, flags in LAYOUTS
    ]
    states_rows = []
    for model, title, devices, tp in STATES:
        numbers = [_states(model, devices, _sharded(tp, stage)) for stage in STAGES]
        if model == PLANNED:
            peaks = [gib(_layout(model, devices, _sharded(tp, stage), 1), "peak") for stage in STAGES]
            numbers = [f"{states} / {peak}" for states, peak in zip(numbers, peaks, strict=True)]
        if (model, tp) == ("internlm-7b", 1):
            numbers[1] = f"**{numbers[1]}**"  # the stage of the recipe
        disk = f"{estimates.checkpoint_bytes(PRESETS[model]) / GIB:.0f} GiB"
        first, last = (f"{title}, {devices}", disk) if tp == 1 else ("", "")
        states_rows.append([first, str(tp), *numbers, last])
    return {table[0][0]: table for table in (rows, layouts, states_rows)}


def computed_states(case: str) -> estimates.ModelStates:
    """Model states of a case during a step by `models.estimates`."""
    words = case.split()

    def number(flag: str, default: int) -> int:
        return int(words[words.index(flag) + 1]) if flag in words else default

    parallel = ParallelConfig(
        tensor_model_parallel_size=number(TP, 1),
        pipeline_model_parallel_size=number(PP, 1),
        zero_stage=number("--zero-stage", int("--use-distributed-optimizer" in words)),  # type: ignore[arg-type]
    )
    replicas = number("--devices", 1) // parallel.model_size
    return estimates.model_states(PRESETS[words[1]], parallel, replicas, "bf16", fp32_gradients=True)


def _states(model: str, devices: int, flags: str) -> str:
    return f"{computed_states(_layout(model, devices, flags)).total / GIB:.1f}"


def with_tables(page: str, tables: dict[str, list[list[str]]], comma: str) -> str:
    """The page with the rows of every table that it has. `comma`: that of the language."""
    lines = page.split("\n")
    for first, rows in tables.items():
        start = f"| {first.replace(', ', comma)} |"
        at = next((i for i, line in enumerate(lines) if line.startswith(start)), None)
        if at is not None:
            end = next(i for i in range(at, len(lines)) if not lines[i].startswith("|"))
            lines[at:end] = [_line(row, comma) for row in rows]
    return "\n".join(lines)


def _line(row: list[str], comma: str) -> str:
    cells = [row[0].replace(", ", comma), *row[1:]]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def pages() -> dict[Path, str]:
    """Page -> comma of its language."""
    return {
        ROOT / "docs" / f"{name}{suffix}.md": comma
        for name in ("memory", "parallel")
        for suffix, comma in (("", ", "), ("_zh", "，"))
    }


@dataclass(frozen=True)
class Options:
    """Flags of memory_tables.py."""

    update: bool = False
    """Plan the cases, and keep their sizes."""
    model: tuple[str, ...] = ()
    """Plan the cases of these models only; default: all that are not kept yet."""


def main() -> None:
    """Plans and writes."""
    options = parser.parse(Options, description=__doc__ or "")
    sizes = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if options.update:
        from ascendspeed.distributed import device as devices

        device = devices.prepare("cpu")
        for case in cases():
            if case.split()[1] in options.model if options.model else case not in sizes:
                sizes[case] = plan(case, device)
                print(case, sizes[case], flush=True)
                write_file(KEPT, json.dumps(sizes, indent=1) + "\n")
    if missing := [case for case in cases() if case not in sizes]:
        print(f"{len(missing)} cases are not planned yet; run again with --update", file=sys.stderr)
    for path, comma in pages().items():
        write_file(path, with_tables(path.read_text(), bodies(sizes), comma))


if __name__ == "__main__":
    errors.run(main)
