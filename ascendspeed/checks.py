"""What can be known to be wrong with a run before anything is started. No torch."""

import math
from collections.abc import Callable
from typing import Any

from ascendspeed import config, schedule
from ascendspeed.config import ModelConfig, Run
from ascendspeed.errors import UserError
from ascendspeed.families import FAMILIES
from ascendspeed.families.family import check_experts, check_heads

Rule = tuple[str, Callable[[Any], bool]]
AT_LEAST_1: Rule = ("must be at least 1", lambda value: value >= 1)
POSITIVE: Rule = ("must be above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Rule = ("must be 0 or more", lambda value: 0 <= value < math.inf)
SHARE: Rule = ("must be at least 0 and below 1", lambda value: 0 <= value < 1)

RANGES: dict[str, dict[Rule, str]] = {  # group -> rule -> its fields; None is always allowed where a field may be None
    "model": {
        AT_LEAST_1: "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
        "max_position_embeddings num_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size",
        POSITIVE: "norm_epsilon rotary_base rope_scaling_factor",
        NOT_NEGATIVE: "init_method_std",
    },
    "parallel": {AT_LEAST_1: "make_vocab_size_divisible_by"},
    "optim": {SHARE: "adam_beta1 adam_beta2", POSITIVE: "adam_eps", NOT_NEGATIVE: "weight_decay clip_grad"},
    "data": {AT_LEAST_1: "seq_length"},
    "train": {
        AT_LEAST_1: "micro_batch_size global_batch_size train_iters log_interval eval_iters max_skipped_steps save_interval "
        "eval_interval exit_interval keep",
        SHARE: "attention_dropout hidden_dropout",
        POSITIVE: "exit_duration_in_mins distributed_timeout_minutes",
    },
}


def check(run: Run, world: int) -> None:
    """Raises `UserError` for numbers that mean nothing and for combinations that `world` processes cannot run."""
    _check_ranges(run)
    _check_precision(run)
    if not run.parallel.deepspeed:
        raise UserError("the DeepSpeed engine is the only one so far; add --deepspeed")
    if not run.data.data_path:
        raise UserError("--data-path is missing: the prefix of a .bin/.idx pair made by tools/preprocess_data.py")
    schedule.check(run.optim, run.train.train_iters)
    _check_layout(run, world)


def _check_ranges(run: Run) -> None:
    for group, rules in RANGES.items():
        for (says, holds), names in rules.items():
            for name in names.split():
                value = getattr(getattr(run, group), name)
                if value is not None and not holds(value):
                    raise UserError(f"--{name.replace('_', '-')} {value}: {says}")


def _check_precision(run: Run) -> None:
    optim = run.optim
    if optim.bf16 and optim.fp16:
        raise UserError("--bf16 and --fp16 contradict each other; choose one")
    if run.parallel.zero_stage == 0 and optim.dtype != "fp32":
        raise UserError(f"--zero-stage 0 does not keep fp32 masters for --{optim.dtype}; use --zero-stage 1")
    scale = optim.initial_loss_scale
    if not (1 <= scale < math.inf) or math.frexp(scale)[0] != 0.5:
        raise UserError(f"--initial-loss-scale {scale:g} is not a power of two")


def _check_experts(run: Run) -> None:
    model, parallel = run.model, run.parallel
    check_experts(model)
    if (model.num_experts is not None) != any("{e}" in row.ours for row in FAMILIES[model.family].rows):
        has = "always has" if model.num_experts is None else "never has"
        raise UserError(f"--num-experts {model.num_experts}: a model of the family {model.family} {has} experts")
    if model.num_experts and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError("experts under tensor parallel train wrongly without sequence parallel; add --sequence-parallel")


def _check_biases(model: ModelConfig) -> None:
    """A family whose checkpoints have no name for a bias cannot be trained with it: it could be neither loaded nor exported."""
    for name in ("add_qkv_bias", "add_dense_bias", "add_mlp_bias"):
        if getattr(model, name) and not any(row.when == name for row in FAMILIES[model.family].rows):
            raise UserError(f"--{name.replace('_', '-')}: the models of the family {model.family} have no such bias; leave it out")


def _check_layout(run: Run, world: int) -> None:
    model, parallel, train = run.model, run.parallel, run.train
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    check_heads(model)
    config.check_tensor_parallel(model, tp)
    config.check_pipeline_parallel(model, pp)
    _check_experts(run)
    _check_biases(model)
    if pp > 1:
        flag = f"--pipeline-model-parallel-size {pp}"
        raise UserError(f"{flag}: the DeepSpeed engine has no pipeline stages; use 1 and a higher TP or ZeRO stage")
    if world % tp:
        raise UserError(f"{world} processes do not split into groups of {tp} for TP {tp}; start a multiple of {tp}")
    if parallel.sequence_parallel and run.data.seq_length % tp:
        raise UserError(f"--seq-length {run.data.seq_length} does not split over {tp} ranks for --sequence-parallel")
    once = train.micro_batch_size * (world // tp)
    if train.global_batch_size % once:
        raise UserError(
            f"--global-batch-size {train.global_batch_size} is not a multiple of --micro-batch-size {train.micro_batch_size}"
            f" x {world // tp} data-parallel ranks = {once}"
        )
