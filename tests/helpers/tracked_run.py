"""A run with a tracker, and lines of its log."""

from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.training.metric_lines import TrainLine


def line(iteration: int, loss: float = 2.5) -> TrainLine:
    return TrainLine("2026-11-30 12:00:00", iteration, 9, loss=loss, lr=1e-3, ms_per_iteration=250.0)


def run_of(tmp_path, **train) -> Run:
    settings = TrainConfig(log_dir=str(tmp_path), wandb_project="p", wandb_exp_name="e", **train)
    return Run(ModelConfig(), ParallelConfig(), OptimConfig(), DataConfig(data_path=("a", "b")), settings)
