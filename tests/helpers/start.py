"""A run to begin, for tests of its start."""

from ascendspeed.config.schema import DataConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models import families

MODEL = families.preset("internlm-tiny")


RUN = Run(
    MODEL,
    ParallelConfig(deepspeed=True),
    OptimConfig(),
    DataConfig(data_path=("x",), seq_length=8),
    TrainConfig(micro_batch_size=1, global_batch_size=4, train_iters=10),
)
