"""Two training runs whose curves are compared."""

import json
from dataclasses import asdict
from pathlib import Path

from hypothesis import strategies as st

from ascendspeed.config import schema
from ascendspeed.models import families
from helpers.training_logs import ours

CURVE = [
    4.0 * 0.98**i + 0.3 * (i % 3) for i in range(100)
]  # falls, with a pattern: a shift by one step is not small


losses = st.floats(1e-3, 20, allow_nan=False)


def write_run(folder: Path, losses, zero_stage: int = 2, **begin: str) -> Path:
    """A log of ours with its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    run = asdict(example_run(zero_stage))
    text = f"device: cpu (some CPU), gloo; 2 processes: TP 1 x DP 2\nrun: {json.dumps(run)}\n"
    (folder / "train.log").write_text(text + "".join(ours(i, loss) for i, loss in enumerate(losses, 1)))
    if begin:
        (folder / "origin.json").write_text(json.dumps({"seed": "1", "weights": "w", "data": "d"} | begin))
    return folder


def example_run(zero_stage: int = 2) -> schema.Run:
    parallel = schema.ParallelConfig(zero_stage=zero_stage, deepspeed=True)
    data = schema.DataConfig(data_path=("<b>corpus</b>",))
    return schema.Run(
        families.preset("internlm-tiny"), parallel, schema.OptimConfig(), data, schema.TrainConfig()
    )
