"""Weight gradients that the product adds to their fp32 sums: bit-equal to sums in a pass of their own."""

from pathlib import Path

import pytest
from helpers import launch
from helpers.engines import DATA_SEED, RUN

from ascendspeed.config import schema

STEPS = 2
MEGATRON = {"deepspeed": False, "zero_stage": 2}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "zero 1": {"parallel": {"zero_stage": 1}},
    "zero 1, tp2 sp": {"parallel": {"zero_stage": 1, **TENSOR}},
    "replicated": {"parallel": MEGATRON},
    "distributed, overlapped": {
        "parallel": {**MEGATRON, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    },
    "tp2 sp": {"parallel": {**MEGATRON, **TENSOR}},
    "tp2": {"parallel": {**MEGATRON, "tensor_model_parallel_size": 2}},
    "pp2": {"parallel": {**MEGATRON, "pipeline_model_parallel_size": 2}},
    "recomputed": {"parallel": MEGATRON, "train": {"recompute_granularity": "full"}},
}
"""Layouts of two ranks, two to four micro-batches each."""
QUICK = ("zero 1, tp2 sp", "distributed, overlapped", "tp2 sp")


def curves(cases, folder: Path):
    job = {"run": schema.to_dict(RUN), "steps": STEPS, "data_seed": DATA_SEED, "cases": cases}
    return launch.ranks(2, "engine_worker.py", job, folder)


def case(layout, optim=None, **more):
    return {"changes": {**layout, "optim": optim or {"bf16": True}}, **more}


@pytest.mark.slow
@pytest.mark.parametrize("names", [QUICK, tuple(LAYOUTS)])
def test_losses_and_norms_are_equal_to_the_bit(names, tmp_path):
    cases = {name: case(LAYOUTS[name]) for name in names}
    cases |= {f"{name}: fused": case(LAYOUTS[name], weight_gradient=1.0) for name in names}
    controls = {f"{name}: control": case(LAYOUTS[name], weight_gradient=1.01) for name in QUICK[:2]}
    result = curves(cases | controls, tmp_path)
    for name in names:
        assert result[f"{name}: fused"] == result[name], name
    for name in controls:
        assert result[name] != result[name.partition(":")[0]], name


@pytest.mark.slow
def test_gradients_that_are_added_at_once_are_equal_to_kept_ones(tmp_path):
    """DeepSpeed's immediate_grad_update, which this project switches on."""
    (tmp_path / "kept.json").write_text('{"bf16": {"immediate_grad_update": false}}')
    layouts = {name: LAYOUTS[name] for name in ("zero 1", "zero 1, tp2 sp")}
    kept = {"deepspeed_config": str(tmp_path / "kept.json")}
    cases = {name: case(layout) for name, layout in layouts.items()}
    cases |= {
        f"{name}: kept": case({"parallel": layout["parallel"] | kept}) for name, layout in layouts.items()
    }
    result = curves(cases, tmp_path / "ranks")
    for name in layouts:
        assert result[f"{name}: kept"] == result[name], name


@pytest.mark.parametrize(
    ("model", "parallel", "dtype", "expected"),
    [
        ({}, {}, "bf16", True),
        ({}, {"deepspeed": True, "zero_stage": 1}, "bf16", True),
        ({}, {"deepspeed": True, "zero_stage": 2}, "bf16", False),
        ({}, {}, "fp32", False),
        ({}, {}, "fp16", False),
        ({"tie_embeddings": True}, {}, "bf16", False),
        ({"normalize_head": True}, {}, "bf16", False),
    ],
)
def test_only_whole_fp32_sums_of_own_weights_are_added_to(cpu, model, parallel, dtype, expected):
    from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.models.gpt.layer_spec import transformer_config

    kernels = Kernels(weight_gradient=lambda x, gradient, total: None)
    settings = (ModelConfig(**model), ParallelConfig(**parallel), TrainConfig(), dtype)
    assert transformer_config(*settings, kernels).gradient_accumulation_fusion == expected
    assert not transformer_config(*settings, Kernels()).gradient_accumulation_fusion
