"""The DeepSpeed configuration of a run: derived from the flags, with additions from `--deepspeed_config`."""

import math
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import ParallelConfig, Run
from ascendspeed.models import estimates
from ascendspeed.models.lora import targets
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json

BUCKET_SIZE = 40_000_000
"""Largest elements of a communication bucket, which is Megatron-core's default too; and as there, at least
`BUCKET_SIZE_PER_REPLICA` for every data-parallel rank, so that each rank's share stays efficient."""
BUCKET_SIZE_PER_REPLICA = 1_000_000
REQUIRED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
"""Settings that this project's own AdamW needs; it has the same settings and states under every engine."""
DECIDED = {
    "optimizer": "come from the flags (--lr, --adam-beta2 ...)",
    "scheduler": "come from the flags (--lr, --lr-decay-style ...)",
    "torch_autocast": "comes from --bf16 or --fp16",
    "tensor_parallel": "comes from --tensor-model-parallel-size",
    "expert_parallel": "belongs to Megatron's engine",
    "gradient_allreduce_op": "is the mean over the supervised tokens, in every layout",
    "managed_gradient_accumulation": "is the training loop's",
    "weight_quantization": "is for inference",
    "hybrid_engine": "is for generation during training",
}
"""Settings that a file may not hold -> the reason."""
OLD_NAMES = {"bfloat16": "bf16"}
"""Names of sections that DeepSpeed still reads -> their current names."""


def ds_config(run: Run, world: int) -> dict[str, Any]:
    """Returns the configuration; a `--deepspeed_config` file may add to it.

    Raises `UserError` if it contradicts the flags. `deepspeed_check` reports what DeepSpeed refuses.
    """
    given: dict[str, Any] = {}
    if run.parallel.deepspeed_config:
        given = read_additions(run.parallel.deepspeed_config)
    derived = _derived(run, world)
    _refuse_contradictions(derived, given, run.parallel.deepspeed_config)
    return merge(merge(_defaults(run, world), _without_auto(given)), derived)


def _derived(run: Run, world: int) -> dict[str, Any]:
    """Settings that the flags decide."""
    optim, train, parallel = run.optim, run.train, run.parallel
    dp = world // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    fp16: dict[str, Any] = {"enabled": optim.fp16}
    if optim.fp16:
        fp16["initial_scale_power"] = int(math.log2(optim.initial_loss_scale))
    bf16: dict[str, Any] = {"enabled": optim.bf16}
    if optim.bf16:
        bf16["check_grad_overflow"] = True
    return {
        # A sample counts once for every context-parallel rank, each of which DeepSpeed takes for a replica.
        "train_batch_size": train.global_batch_size * parallel.context_parallel_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dp),
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": {"stage": parallel.zero_stage, **_zero_options(parallel)},
        "bf16": bf16,
        "fp16": fp16,
        "data_types": {"grad_accum_dtype": "fp32"},
        **REQUIRED,
    }


def _zero_options(parallel: ParallelConfig) -> dict[str, Any]:
    """ZeRO options beyond the stage: a secondary partition within each node (hpZ) and offloaded optimizer
    states.
    """
    options: dict[str, Any] = {}
    if parallel.zero_hpz_partition_size > 1:
        options["zero_hpz_partition_size"] = parallel.zero_hpz_partition_size
    if parallel.zero_offload != "none":
        options["offload_optimizer"] = {"device": parallel.zero_offload}
    if parallel.zero_offload == "nvme":
        options["offload_optimizer"]["nvme_path"] = parallel.zero_offload_nvme_path
    return options


def _defaults(run: Run, world: int) -> dict[str, Any]:
    """Settings that a `--deepspeed_config` file may change."""
    bucket_size = _bucket_size(run, world)
    zero = {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket_size,
        "allgather_bucket_size": bucket_size,
    }
    if run.parallel.zero_stage in (0, 3):
        del zero["allgather_bucket_size"], zero["reduce_scatter"]
    # Otherwise DeepSpeed's optimizer for this case keeps all bf16 gradients, 2 bytes per parameter, until
    # the update.
    immediate = {"immediate_grad_update": True} if run.optim.bf16 and run.parallel.zero_stage == 1 else {}
    return {
        "zero_optimization": zero,
        "bf16": immediate,
        # As in Megatron; bf16 halves the traffic and rounds every gradient.
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        # It waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def _bucket_size(run: Run, world: int) -> int:
    """Elements of a communication bucket: no more than the trained parameters of a rank.

    DeepSpeed allocates two such buffers in fp32 before the first step; its own default of 5e8 elements takes
    4 GB, whatever is trained.
    """
    tp = run.parallel.tensor_model_parallel_size
    if run.lora.lora_rank:
        trained = targets.trained_count(run.model, run.lora, run.parallel)
    else:
        trained = estimates.parameters_per_device(run.model, run.parallel)
    return min(trained, max(BUCKET_SIZE, BUCKET_SIZE_PER_REPLICA * (world // tp)))


def read_additions(path: str) -> dict[str, Any]:
    """Reads a `--deepspeed_config` file, sections under their current names.

    Raises `UserError` if it is no JSON object, repeats a key, or has a section that is not an object.
    """
    try:
        config = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path} is not a JSON object")
    for old, new in OLD_NAMES.items():
        if old in config and new in config:
            raise UserError(f"--deepspeed_config {path}: {old} is an old name of {new}; keep one of them")
        if old in config:
            config[new] = config.pop(old)
    for section in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(
                f"--deepspeed_config {path}: {section} = {config[section]!r} is not an object, "
                "{ names and values }"
            )
    if config.get("fp16", {}).get("loss_scale") not in (None, 0, "auto"):
        raise UserError(
            f"--deepspeed_config {path}: fp16.loss_scale sets a constant scale; remove it, the loss scale "
            "is dynamic here"
        )
    return config


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """The settings whose value is not "auto", which leaves a setting to this program."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


def _refuse_contradictions(
    derived: dict[str, Any], given: dict[str, Any], path: str | None, prefix: str = ""
) -> None:
    """Raises `UserError` for a setting of the file that differs from the flags.

    `prefix`: the enclosing keys, `a.b.`.
    """
    for key, value in given.items():
        expected = derived.get(key)
        if isinstance(expected, dict) and isinstance(value, dict):
            _refuse_contradictions(expected, value, path, f"{prefix}{key}.")
        elif key in derived and value not in (expected, "auto"):
            if key in REQUIRED:
                raise UserError(
                    f"--deepspeed_config {path}: {key} = {value!r}, but the optimizer here needs "
                    f"{expected!r}; remove it"
                )
            raise UserError(
                f"--deepspeed_config {path}: {prefix}{key} = {value!r}, but the flags make it {expected!r}; "
                "correct one of them"
            )
    if prefix:
        return
    for key in DECIDED:
        if given.get(key, {"enabled": False}) != {"enabled": False}:
            raise UserError(f"--deepspeed_config {path}: {key} {DECIDED[key]}; remove it there")
    stage = derived["zero_optimization"]["stage"]
    for key, least, devices in (("offload_param", 3, ("cpu", "nvme")), ("offload_optimizer", 3, ("nvme",))):
        section = given.get("zero_optimization", {}).get(key)
        device = section.get("device") if isinstance(section, dict) else None
        if device in devices and stage < least:
            raise UserError(
                f"--deepspeed_config {path}: zero_optimization.{key}.device = {device!r} needs --zero-stage "
                f"{least}, not {stage}"
            )


def merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Merges nested dictionaries; values of `upper` win."""
    merged = lower | upper
    for key in lower.keys() & upper.keys():
        if isinstance(lower[key], dict) and isinstance(upper[key], dict):
            merged[key] = merge(lower[key], upper[key])
    return merged
