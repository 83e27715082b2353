"""The DeepSpeed configuration is derived from the run; a file may add to it and may not contradict it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ascendspeed.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    TrainConfig,
)
from ascendspeed.models import estimates, families
from ascendspeed.models.lora import targets
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


def test_bf16_gradients_are_added_at_once_at_stage_1_only(cpu, tmp_path):
    """DeepSpeed would keep them all; a file may ask for that."""
    first = replace(RUN, parallel=replace(RUN.parallel, zero_stage=1))
    assert derived(cpu, tmp_path, run=first)["bf16"]["immediate_grad_update"]
    given = {"bf16": {"immediate_grad_update": False}, "timers": {"throughput": {"enabled": True}}}
    config = derived(cpu, tmp_path, given, first)
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": False}
    assert config["timers"] == given["timers"]
    assert derived(cpu, tmp_path, run=first)["timers"] == {"throughput": {"enabled": False}}


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
        ({"bfloat16": {"enabled": False}}, "bf16.enabled = False, but the flags make it True"),
        ({"zero_allow_untested_optimizer": False}, "but the optimizer here needs True; remove it"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast comes from --bf16"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is the mean"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "offload_param.device = 'cpu' needs --zero-stage 3, not 2",
        ),
        ("{", "ds.json is not JSON: Expecting property name"),
        ('{"bf16": {"enabled": true, "enabled": true}}', "not JSON: it has the key 'enabled' twice"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "not JSON: it is nested too deeply"),
        ({"bf16": {}, "bfloat16": {}}, "bfloat16 is an old name of bf16; keep one of them"),
        ({"fp16": "auto"}, "fp16 = 'auto' is not an object"),
        ({"zero_optimization": []}, r"zero_optimization = \[\] is not an object"),
        ({"fp16": None}, "fp16 = None is not an object"),
        ("[]", "ds.json is not a JSON object"),
        ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale sets a constant scale"),
    ],
)
def test_a_file_may_not_contradict(cpu, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        derived(cpu, tmp_path, given)


def test_an_old_name_is_read(cpu, tmp_path):
    config = derived(cpu, tmp_path, {"bfloat16": {"enabled": True, "check_grad_overflow": True}})
    assert "bfloat16" not in config
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}


def test_auto_leaves_a_setting_to_the_flags_and_the_defaults(cpu, tmp_path):
    given = {
        "train_batch_size": "auto",
        "communication_data_type": "auto",
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
    }
    assert derived(cpu, tmp_path, given) == derived(cpu, tmp_path)


LORA = LoraConfig(lora_rank=16, lora_target_modules=("all-linear",))
LARGE, SMALL = families.preset("internlm2-7b"), families.preset("internlm-tiny")


@pytest.mark.parametrize(
    ("model", "lora", "world", "size"),
    [
        (LARGE, LoraConfig(), 8, 40_000_000),  # all parameters: the largest bucket
        (LARGE, LoraConfig(), 512, 256_000_000),  # a share of a million for each of 256 replicas
        (LARGE, LORA, 8, None),  # the adapters of a rank
        (SMALL, LoraConfig(), 8, None),  # the parameters of a rank
    ],
)
def test_buckets_are_as_large_as_what_is_trained(cpu, tmp_path, model, lora, world, size):
    lora = targets.resolve_config(model, lora)
    run = replace(RUN, model=model, lora=lora, train=replace(RUN.train, global_batch_size=world))
    if size is None:
        size = (
            targets.parameter_count(model, lora, RUN.parallel)
            if lora.lora_rank
            else estimates.parameters_per_device(model, RUN.parallel)
        )
        assert size < 40_000_000
    zero = derived(cpu, tmp_path, run=run, world=world)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (size, size)
    given = {"zero_optimization": {"reduce_bucket_size": 500_000_000}}
    zero = derived(cpu, tmp_path, given, run, world)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (500_000_000, size)


def checked(cpu, tmp_path, given):
    """Derives the configuration and checks it by DeepSpeed's own classes."""
    from ascendspeed.training.engines import deepspeed_check
    from ascendspeed.training.engines.deepspeed import import_deepspeed
    from ascendspeed.training.engines.deepspeed_config import read_additions

    config = derived(cpu, tmp_path, given)
    import_deepspeed(cpu)
    deepspeed_check.check(config, read_additions(str(tmp_path / "ds.json")), "ds.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_cliping": 1}, "has no setting gradient_cliping; did you mean gradient_clipping?"),
        ({"gradient_cliping": "auto"}, "has no setting gradient_cliping"),
        ({"zero_optimisation": {"stage": 2}}, r"zero_optimisation; did you mean zero_optimization\?"),
        ({"zero_optimization": {"stge": 2}}, r"zero_optimization.stge; did you mean stage\? \(it has stage,"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            r"zero_optimization.offload_optimizer.devise; did you mean device\?",
        ),
        ({"flops_profiler": {"enabld": True}}, r"flops_profiler.enabld; did you mean enabled\?"),
        (
            {"zero_optimization": {"overlap_com": "auto"}},
            r"zero_optimization.overlap_com; did you mean overlap_comm\? \(it has overlap_comm,",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pinmemory": "auto"}}},
            r"zero_optimization.offload_optimizer.pinmemory; did you mean pin_memory\?",
        ),
        ({"bf16": {"enabeld": "auto"}}, r"bf16.enabeld; did you mean enabled\?"),
        ({"fp16": {"losss_scale": "auto"}}, r"fp16.losss_scale; did you mean loss_scale\?"),
        ({"comms_logger": {"enabld": "auto"}}, r"comms_logger.enabld; did you mean enabled\?"),
        ({"tensorboard": {"outputpath": "auto"}}, r"tensorboard.outputpath; did you mean output_path\?"),
        ({"aio": {"blocksize": "auto"}}, r"aio.blocksize; did you mean block_size\?"),
        ({"data_types": {"grad_accum_dtyp": "auto"}}, r"grad_accum_dtyp; did you mean grad_accum_dtype\?"),
        ({"nebula": {"enabled": True}}, "Nebula checkpointing has been removed"),
        ({"amp": {"enabled": True}}, "Apex AMP integration has been removed"),
        ({"zero_optimization": {"reduce_bucket_size": "x"}}, "reduce_bucket_size = 'x': Input should be a"),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_size": 15099494.4}},
            "zero_optimization.stage3_prefetch_bucket_size = 15099494.4: Input should be a valid integer",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            "offload_optimizer.device = 'gpu': Input should be 'none', 'cpu' or 'nvme'",
        ),
        ({"communication_data_type": "int8"}, "Invalid communication_data_type. Supported"),
        ({"steps_per_print": "often"}, "steps_per_print = 'often' has the wrong type"),
        ({"prescale_gradients": "yes"}, "prescale_gradients = 'yes' has the wrong type"),
    ],
)
def test_what_deepspeed_does_not_know_or_refuses_is_one_line(cpu, tmp_path, given, message):
    with pytest.raises(UserError, match=message) as error:
        checked(cpu, tmp_path, given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"zero_optimization": {"stage3_prefetch_bucket_size": "auto", "overlap_comm": False}},
        {
            "zero_optimization": {
                "stage": "auto",
                "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
                "reduce_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            },
            "fp16": {"enabled": "auto", "loss_scale": "auto", "hysteresis": "auto"},
            "bf16": {"enabled": "auto"},
            "data_types": {"grad_accum_dtype": "auto"},
            "activation_checkpointing": {"partition_activations": "auto"},
            "flops_profiler": {"enabled": "auto", "detailed": "auto"},
            "aio": {"block_size": "auto"},
        },
        {"tensorboard": {"enabled": True, "output_path": "monitor", "job_name": "x"}},
        {"flops_profiler": {"enabled": False, "profile_step": 1, "output_file": None}},
        {"comms_logger": {"enabled": False, "prof_all": True, "prof_ops": []}},
        {"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False}},
        {"communication_data_type": "bf16", "steps_per_print": 1, "gradient_predivide_factor": 1},
    ],
)
def test_control_settings_of_deepspeed_pass(cpu, tmp_path, given):
    checked(cpu, tmp_path, given)


def test_sections_without_effect_are_named(cpu, tmp_path, capsys):
    checked(cpu, tmp_path, {"activation_checkpointing": {"partition_activations": True}})
    assert "activation_checkpointing has no effect: --recompute-granularity" in capsys.readouterr().out


def test_what_deepspeed_refuses_later_is_one_line(cpu, tmp_path):
    """While it sets up the engine; errors of memory and devices stay what they are."""
    from ascendspeed.training.engines import deepspeed_check

    def text(error: Exception) -> str:
        with pytest.raises(type(error)) as raised:
            raise error
        return str(deepspeed_check.refused(raised.value, "ds.json"))

    assert "an engine with it: raise error (test_ds_config.py); remove" in text(AssertionError())
    error = ValueError("pre-scale gradients is not yet supported")
    assert "pre-scale gradients is not yet supported; remove" in text(error)
    assert deepspeed_check.is_refusal(error)
    assert not deepspeed_check.is_refusal(RuntimeError("out of memory"))


def test_a_file_that_is_not_there_is_an_error(cpu, tmp_path):
    run = replace(RUN, parallel=replace(RUN.parallel, deepspeed_config=str(tmp_path / "none.json")))
    with pytest.raises(UserError, match=r"none\.json: .*No such file"):
        derived(cpu, tmp_path, run=run)


@pytest.mark.parametrize("changes", ["", "bf16", "replicas", "stage 3", "offload", "file"])
def test_zero_that_shares_nothing_is_stage_0(cpu, tmp_path, monkeypatch, caplog, changes):
    """In fp32 with one data-parallel rank, and never otherwise; the engine and its configuration agree."""
    from ascendspeed.training import engines
    from ascendspeed.training.engines import deepspeed, deepspeed_check

    file = tmp_path / "additions.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    parallel = {
        "stage 3": {"zero_stage": 3},
        "offload": {"zero_offload": "cpu"},
        "file": {"deepspeed_config": str(file)},
    }.get(changes, {})
    run = replace(
        RUN,
        parallel=replace(RUN.parallel, **parallel),
        optim=OptimConfig(bf16=changes == "bf16"),
        train=replace(RUN.train, log_dir=str(tmp_path)),
    )
    grid = SimpleNamespace(rank=0, world=2 * (1 + (changes == "replicas")), dp_cp=1 + (changes == "replicas"))
    monkeypatch.setattr(deepspeed, "import_deepspeed", lambda device: None)
    monkeypatch.setattr(deepspeed_check, "check", lambda *_: None)
    monkeypatch.setattr(deepspeed, "DeepSpeedEngine", lambda run, *_: run)
    with caplog.at_level("INFO"):
        built = engines.engine_builder(run, grid, cpu, None)(None)
    stage = 3 if changes == "stage 3" else 2 if changes else 0
    config = json.loads((tmp_path / "ds_config.json").read_text())
    assert (built.parallel.zero_stage, config["zero_optimization"]["stage"]) == (stage, stage)
    assert ("stage 0 is used" in caplog.text) == (stage == 0)
