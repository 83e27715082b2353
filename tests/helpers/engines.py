"""One training run and its reference curve, for tests of both engines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ascendspeed.config import schema
from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from helpers import launch

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=125,
    max_position_embeddings=64,
    init_method_std=0.1,
)


STEPS, DATA_SEED = 20, 7
FEW_STEPS = 3
"""Steps of a default test, which gives an engine the learning rate of each. Slow tests run all of them."""


RUN = Run(
    MODEL,
    ParallelConfig(deepspeed=True),
    OptimConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=4, weight_decay=0.1, clip_grad=1.0),
    DataConfig(data_path=("unused",), seq_length=32),
    TrainConfig(micro_batch_size=1, global_batch_size=4, train_iters=STEPS),
)


LAYOUTS = {"tp1-dp1": (1, 1), "tp1-dp2": (1, 2), "tp2-dp1": (2, 1), "tp2-dp2": (2, 2)}


Curve = list[list[float]]


def run_cases(
    layout: str, cases: dict[str, Any], folder: Path, steps: int = STEPS, **train: Any
) -> dict[str, Curve]:
    """Every case in one start of processes: case -> [[loss, gradient norm], ...]."""
    tp, dp = LAYOUTS[layout]
    run = replace(
        RUN, parallel=replace(RUN.parallel, tensor_model_parallel_size=tp), train=replace(RUN.train, **train)
    )
    job = {"run": schema.to_dict(run), "steps": steps, "data_seed": DATA_SEED, "cases": cases}
    return launch.ranks(tp * dp, "engine_worker.py", job, folder)


def micro_batches_of(parallel: dict[str, Any]) -> dict[str, int]:
    """Training fields of a layout: fewer, larger micro-batches where ranks exchange activations in each."""
    exchanges = {"tensor_model_parallel_size", "context_parallel_size"} & parallel.keys()
    return {"micro_batch_size": 2} if exchanges else {}


def changes(stage: int, **optim: Any) -> dict[str, Any]:
    return {"parallel": {"zero_stage": stage}, "optim": optim}


def worst(curve: Curve, expected: Curve) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the gradient norms."""
    pairs = list(zip(curve, expected, strict=True))
    return max(abs(a[0] - b[0]) / b[0] for a, b in pairs), max(abs(a[1] - b[1]) / b[1] for a, b in pairs)
