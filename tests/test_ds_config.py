"""The DeepSpeed configuration is derived from the run; a file may add to it and may not contradict it."""

import json
from dataclasses import replace

import pytest

from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.utils.errors import UserError

RUN = Run(
    ModelConfig(),
    ParallelConfig(tensor_model_parallel_size=2, deepspeed=True, zero_stage=2),
    OptimConfig(bf16=True, clip_grad=0.5),
    DataConfig(),
    TrainConfig(micro_batch_size=2, global_batch_size=16),
)


def derived(cpu, tmp_path, given=None, run=RUN, world=8):
    from ascendspeed.training.engines.deepspeed_config import ds_config

    if given is not None:
        (tmp_path / "ds.json").write_text(given if isinstance(given, str) else json.dumps(given))
        run = replace(run, parallel=replace(run.parallel, deepspeed_config=str(tmp_path / "ds.json")))
    return ds_config(run, world)


def test_it_says_what_the_run_says(cpu, tmp_path):
    config = derived(cpu, tmp_path)
    assert (
        config["train_batch_size"],
        config["train_micro_batch_size_per_gpu"],
        config["gradient_accumulation_steps"],
    ) == (16, 2, 2)
    assert config["gradient_clipping"] == 0.5  # what clips
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_fp16_takes_the_initial_loss_scale(cpu, tmp_path):
    run = replace(RUN, optim=OptimConfig(fp16=True, initial_loss_scale=524288.0))
    assert derived(cpu, tmp_path, run=run)["fp16"] == {"enabled": True, "initial_scale_power": 19}


def test_flags_put_states_elsewhere(cpu, tmp_path):
    """A second partition within a node and a disk: DeepSpeed's own names, added to the other settings."""
    zero = {"zero_stage": 3, "tensor_model_parallel_size": 1, "zero_hpz_partition_size": 4}
    run = replace(
        RUN, parallel=replace(RUN.parallel, **zero, zero_offload="nvme", zero_offload_nvme_path="/nvme")
    )
    settings = derived(cpu, tmp_path, run=run)["zero_optimization"]
    assert settings["offload_optimizer"] == {"device": "nvme", "nvme_path": "/nvme"}
    assert (settings["stage"], settings["zero_hpz_partition_size"], settings["overlap_comm"]) == (3, 4, True)
    assert (
        not {"offload_optimizer", "zero_hpz_partition_size"}
        & derived(cpu, tmp_path)["zero_optimization"].keys()
    )


def test_a_file_may_add(cpu, tmp_path):
    given = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5, "stage": 2},
        "communication_data_type": "bf16",
        "train_batch_size": "auto",
    }
    config = derived(cpu, tmp_path, given)
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["zero_optimization"]["reduce_bucket_size"] == 5
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["communication_data_type"] == "bf16"
    assert config["train_batch_size"] == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3, but the flags make it 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0, but the flags make it 0.5"),
        ({"train_batch_size": 8}, "train_batch_size = 8, but the flags make it 16"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu = 1, but the flags make it 2",
        ),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps = 1, but the flags make it 2"),
        ({"bf16": {"enabled": False}}, "bf16.enabled = False, but the flags make it True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True, but the flags make it False"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            "data_types.grad_accum_dtype = 'bf16', but the flags make it 'fp32'",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer come from the flags"),
        ("{", "ds.json: Expecting property name"),
        ("[]", "ds.json is not a JSON object"),
        ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale sets a constant scale"),
    ],
)
def test_a_file_may_not_contradict(cpu, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        derived(cpu, tmp_path, given)


def test_a_file_that_is_not_there_is_an_error(cpu, tmp_path):
    run = replace(RUN, parallel=replace(RUN.parallel, deepspeed_config=str(tmp_path / "none.json")))
    with pytest.raises(UserError, match=r"none\.json: .*No such file"):
        derived(cpu, tmp_path, run=run)
