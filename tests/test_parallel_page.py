"""docs/parallel.md: every flag that it names exists, and every figure is the planner's, or counted."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers import launch

from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.distributed import fused_kernels
from ascendspeed.models import estimates
from ascendspeed.models.families import PRESETS

PAGE = (launch.ROOT / "docs" / "parallel.md").read_text()
FLAGS = set((Path(__file__).parent / "flags.txt").read_text().split())
GIB = 2**30
TOKENS = 2048  # of the sample whose activations the page tells


def rows(first: str) -> list[list[str]]:
    """The cells of the lines of a table, below the header that begins with `first`."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def states(name: str, data_parallel: int, **layout: int) -> str:
    states = estimates.model_states(
        PRESETS[name], ParallelConfig(**layout), data_parallel, "bf16", fp32_gradients=True
    )
    return f"{states.total / GIB:.1f}"


def test_every_flag_exists():
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", PAGE))
    assert len(named) > 20
    assert named <= FLAGS
    assert "--sequence-parallel-size" not in FLAGS  # control


SIZES = {row[0]: row[1:] for row in rows("model")}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model, size = PRESETS[name], SIZES[name]
    ours = [f"{estimates.parameter_count(model) / 1e9:.2f}", f"{estimates.checkpoint_bytes(model) / GIB:.0f}"]
    ours += [
        " / ".join(states(name, devices, zero_stage=stage) for stage in (1, 2, 3)) for devices in (8, 32)
    ]
    assert size[:4] == ours
    assert size[5] == f"{2 * TOKENS * model.hidden_size * model.num_layers / GIB:.2f}"


def saved(model, layers: int, here) -> int:
    """Bytes that autograd keeps of a pass over 64 tokens, weights aside."""
    model = dataclasses.replace(model, num_layers=layers)
    plain = fused_kernels.select_kernels(here, rms_norm=False, rotary=False, swiglu=False)
    from ascendspeed.models.gpt import gpt_model
    from ascendspeed.models.gpt.layer_spec import transformer_config

    built = gpt_model.build_model(
        model, ParallelConfig(), transformer_config(model, ParallelConfig(), TrainConfig(), "bf16", plain)
    )
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in weights:
            saved[at] = tensor
        return tensor

    tokens = torch.zeros(1, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built(tokens, torch.arange(64)[None], None, labels=tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if n % 3 else []) for n, name in enumerate(SIZES)]
)
def test_activations_are_counted(cpu, name):
    """Saved by autograd without fused kernels, in a narrower layer of the same proportions."""
    whole = PRESETS[name]
    times = min(whole.kv_heads, 8)
    model = dataclasses.replace(
        whole,
        hidden_size=whole.hidden_size // times,
        ffn_hidden_size=whole.ffn_hidden_size // times,
        num_attention_heads=whole.num_attention_heads // times,
        num_query_groups=whole.kv_heads // times,
        vocab_size=512,
    )
    layer = (saved(model, 3, cpu) - saved(model, 1, cpu)) / 2
    assert float(SIZES[name][4]) == pytest.approx(
        layer / 64 * times * TOKENS * whole.num_layers / GIB, abs=0.051
    )


LAYOUTS = rows("model, devices")


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: row[0])
def test_layouts(row):
    name, devices = re.fullmatch(r"`(\S+)`, (\d+)", row[0]).groups()
    layout = {"zero_stage": 1}
    for flag, value in re.findall(r"--(\S+) (\d+)", row[1]):
        layout[flag.replace("-", "_")] = int(value)
    parallel = ParallelConfig(**layout)
    data_parallel = int(devices) // parallel.model_size
    assert data_parallel == 1 or "--deepspeed" in row[1] or "--use-distributed-optimizer" in row[1]
    assert row[2] == states(name, data_parallel, **layout)
    model, tp = PRESETS[name], parallel.tensor_model_parallel_size
    inputs = (
        2 * 2 * TOKENS * model.hidden_size * model.num_layers / tp / GIB
    )  # two samples; of a pipeline the first stage
    assert row[4] == f"{inputs:.1f}"
    assert float(row[3]) == pytest.approx(2 * float(SIZES[name][4]) / tp, abs=0.11)  # both are rounded to 0.1
