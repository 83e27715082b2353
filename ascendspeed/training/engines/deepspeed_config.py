"""The DeepSpeed configuration of a run: derived from the flags, with additions from `--deepspeed_config`."""

import json
import math
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import ParallelConfig, Run
from ascendspeed.utils.errors import UserError


def ds_config(run: Run, world: int) -> dict[str, Any]:
    """Returns the configuration; a `--deepspeed_config` file may add to it.

    Raises `UserError` if it contradicts the flags.
    """
    given: dict[str, Any] = {}
    if run.parallel.deepspeed_config:
        given = _read_json(run.parallel.deepspeed_config)
    derived = _derived(run, world)
    _refuse_contradictions(derived, given, run.parallel.deepspeed_config)
    return _merge(_merge(_defaults(run.parallel), given), derived)


def _derived(run: Run, world: int) -> dict[str, Any]:
    """Settings that the flags decide."""
    optim, train, parallel = run.optim, run.train, run.parallel
    dp = world // parallel.tensor_model_parallel_size
    fp16: dict[str, Any] = {"enabled": optim.fp16}
    if optim.fp16:
        fp16["initial_scale_power"] = int(math.log2(optim.initial_loss_scale))
    bf16: dict[str, Any] = {"enabled": optim.bf16}
    if optim.bf16:
        bf16["check_grad_overflow"] = True
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dp),
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": {"stage": parallel.zero_stage, **_zero_options(parallel)},
        "bf16": bf16,
        "fp16": fp16,
        "data_types": {"grad_accum_dtype": "fp32"},
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


def _defaults(parallel: ParallelConfig) -> dict[str, Any]:
    """Settings that a `--deepspeed_config` file may change."""
    zero = {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
    }
    if parallel.zero_stage in (0, 3):
        del zero["allgather_bucket_size"], zero["reduce_scatter"]
    return {
        "zero_optimization": zero,
        # As in Megatron; bf16 halves the traffic and rounds every gradient.
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _read_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path} is not a JSON object")
    if (config.get("fp16") or {}).get("loss_scale"):
        raise UserError(
            f"--deepspeed_config {path}: fp16.loss_scale sets a constant scale; remove it, the loss scale "
            "is dynamic here"
        )
    return config


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
            raise UserError(
                f"--deepspeed_config {path}: {prefix}{key} = {value!r}, but the flags make it {expected!r}; "
                "correct one of them"
            )
    if not prefix and (extra := {"optimizer", "scheduler"} & given.keys()):
        raise UserError(
            f"--deepspeed_config {path}: {', '.join(sorted(extra))} come from the flags (--lr, --adam-beta2 "
            "...); remove them there"
        )


def _merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Merges nested dictionaries; values of `upper` win."""
    merged = lower | upper
    for key in lower.keys() & upper.keys():
        if isinstance(lower[key], dict) and isinstance(upper[key], dict):
            merged[key] = _merge(lower[key], upper[key])
    return merged
