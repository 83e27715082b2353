"""Run and adapters of the tests of LoRA at its start."""

from ascendspeed.config.schema import DataConfig, LoraConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models import families

MODEL = families.preset("internlm2-tiny")
NAMES = ("q_proj", "v_proj", "down_proj")
LORA = LoraConfig(4, 8.0, lora_target_modules=NAMES)
RUN = Run(
    MODEL,
    ParallelConfig(),
    OptimConfig(),
    DataConfig(data_path=("x",), seq_length=8),
    TrainConfig(micro_batch_size=1, global_batch_size=4, train_iters=10),
    LORA,
)
