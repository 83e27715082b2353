"""Validation of a run before any process group exists. No torch."""

import math
from collections.abc import Callable, Collection
from typing import Any

from ascendspeed.cli.command import check_precision
from ascendspeed.cli.engine_checks import check_engine, check_fsdp
from ascendspeed.cli.kernel_checks import check_compile, check_fp8, check_triton
from ascendspeed.cli.layout_checks import check_recompute, check_world
from ascendspeed.cli.model_checks import check_model, check_quantization
from ascendspeed.cli.observation_checks import check_eval_tasks, check_profile
from ascendspeed.cli.optimizer_checks import check_muon, check_safeguards, check_split_masters
from ascendspeed.cli.parser import flag_of
from ascendspeed.config import batch_schedule, lr_schedule
from ascendspeed.config.schema import PreferenceConfig, Run
from ascendspeed.utils.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]
AT_LEAST_1: Rule = ("must be at least 1", lambda value: value >= 1)
BELOW_2_31: Rule = ("must be below 2147483648", lambda value: value < 2**31)
BELOW_100: Rule = ("must be below 100", lambda value: value < 100)
SEED: Rule = ("must be from 0 to 4294967295", lambda value: 0 <= value < 2**32)
A_YEAR: Rule = ("must be at most 525600, a year", lambda value: value <= 525600)
POSITIVE: Rule = ("must be above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Rule = ("must be 0 or more", lambda value: 0 <= value < math.inf)
SHARE: Rule = ("must be at least 0 and below 1", lambda value: 0 <= value < 1)
BELOW_HALF: Rule = ("must be at least 0 and below 0.5", lambda value: 0 <= value < 0.5)

RANGES: dict[str, dict[Rule, str]] = {
    "model": {
        AT_LEAST_1: "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "vocab_size max_position_embeddings num_experts moe_router_topk moe_ffn_hidden_size "
        "moe_shared_expert_intermediate_size rope_original_max_position_embeddings",
        BELOW_2_31: "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels vocab_size "
        "max_position_embeddings num_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size",
        POSITIVE: "norm_epsilon rotary_base rope_scaling_factor rope_low_freq_factor rope_high_freq_factor "
        "rope_beta_fast rope_beta_slow rope_attention_factor",
        NOT_NEGATIVE: "init_method_std moe_aux_loss_coeff moe_z_loss_coeff",
    },
    "parallel": {
        AT_LEAST_1: "make_vocab_size_divisible_by num_virtual_stages_per_pipeline_rank context_parallel_size "
        "expert_model_parallel_size num_distributed_optimizer_instances zero_hpz_partition_size",
        BELOW_2_31: "make_vocab_size_divisible_by",
    },
    "optim": {
        SHARE: "adam_beta1 adam_beta2 muon_momentum",
        AT_LEAST_1: "muon_num_ns_steps",
        BELOW_100: "muon_num_ns_steps",
        POSITIVE: "adam_eps",
        NOT_NEGATIVE: "weight_decay clip_grad",
    },
    "data": {
        AT_LEAST_1: "seq_length max_segment_length",
        BELOW_2_31: "seq_length max_segment_length",
        NOT_NEGATIVE: "min_length",
    },
    "lora": {
        NOT_NEGATIVE: "lora_rank",
        BELOW_2_31: "lora_rank",
        POSITIVE: "lora_alpha",
        SHARE: "lora_dropout",
    },
    "preference": {
        POSITIVE: "beta kto_desirable_weight kto_undesirable_weight",
        NOT_NEGATIVE: "simpo_gamma orpo_lambda",
        BELOW_HALF: "dpo_label_smoothing",
    },
    "train": {
        AT_LEAST_1: "micro_batch_size global_batch_size train_iters train_samples log_interval eval_iters "
        "max_skipped_steps save_interval eval_interval eval_tasks_interval eval_tasks_limit exit_interval "
        "keep recompute_num_layers auto_recompute_device_size",
        BELOW_2_31: "micro_batch_size global_batch_size train_iters",
        SEED: "seed",
        SHARE: "attention_dropout hidden_dropout label_smoothing ema_decay",
        NOT_NEGATIVE: "z_loss_coeff rollback_on_spike profile_step_start",
        POSITIVE: "train_epochs exit_duration_in_mins distributed_timeout_minutes",
        A_YEAR: "distributed_timeout_minutes",
    },
}
"""Group -> rule -> fields that it holds for. None is legal for a field that may be None."""


def check_run(run: Run, world: int | None) -> None:
    """Raises UserError for numbers out of range and for combinations that `world` processes cannot run; None
    if their number is not known yet.
    """
    _check_ranges(run)
    _check_precision(run)
    if not run.data.data_path:
        raise UserError(
            "--data-path is missing: the prefix of a .bin/.idx pair written by tools/preprocess_data.py"
        )
    if run.train.train_epochs is None:
        lr_schedule.check_schedule(lr_schedule.Schedule.of(run))
    batch_schedule.check_rampup(run.train)
    batch_schedule.skipped_iterations(run.train)
    _check_token_terms(run)
    check_quantization(run)
    check_fsdp(run)
    check_model(run)
    check_engine(run.parallel)
    check_muon(run)
    check_split_masters(run)
    check_safeguards(run)
    check_profile(run.train)
    check_triton(run.train)
    check_compile(run)
    check_fp8(run)
    check_eval_tasks(run, world)
    if world is not None:
        check_world(run, world)
    check_recompute(run)


def _check_ranges(run: Run) -> None:
    """Raises UserError for a number out of its range."""
    for group, rules in RANGES.items():
        for (requirement, is_legal), names in rules.items():
            for name in names.split():
                value = getattr(getattr(run, group), name)
                if value is not None and not is_legal(value):
                    raise UserError(f"{flag_of(name)} {value}: {requirement}")


def _check_precision(run: Run) -> None:
    """Raises UserError for a number format that the engine or the layout cannot train in."""
    optim = run.optim
    check_precision(optim.bf16, optim.fp16)
    if run.parallel.deepspeed and run.parallel.zero_stage == 0 and optim.dtype != "fp32":
        raise UserError(f"--zero-stage 0 does not keep fp32 masters for --{optim.dtype}; use --zero-stage 1")
    if optim.fp16 and (ranks := run.parallel.expert_model_parallel_size) > 1:
        raise UserError(
            f"--fp16 with --expert-model-parallel-size {ranks}: "
            "experts would get a loss scale of their own; use --bf16"
        )
    scale = optim.initial_loss_scale
    if not (1 <= scale < math.inf) or math.frexp(scale)[0] != 0.5:
        raise UserError(f"--initial-loss-scale {scale:g} is not a power of two")


LOSS_SETTINGS = {
    "beta": ("dpo", "ipo", "orpo", "simpo", "kto"),
    "dpo_label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "orpo_lambda": ("orpo",),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
}
"""Fields of `PreferenceConfig` -> values of --loss that use them."""


def check_preference(preference: PreferenceConfig, typed: Collection[str]) -> None:
    """Raises UserError for given flags that the stage or the loss of the run does not use."""
    for name in ("loss", *LOSS_SETTINGS):
        if name not in typed:
            continue
        flag = f"{flag_of(name)} {getattr(preference, name)}"
        if preference.stage != "dpo":
            raise UserError(f"{flag} belongs to --stage dpo; add it, or leave {flag_of(name)} out")
        losses = LOSS_SETTINGS.get(name, (preference.loss,))
        if preference.loss not in losses:
            raise UserError(
                f"{flag} means nothing to --loss {preference.loss}, only to {' and '.join(losses)}; leave "
                "it out"
            )


def _check_token_terms(run: Run) -> None:
    """Raises UserError for terms of the loss of tokens in a run whose loss is over pairs."""
    for name in ("label_smoothing", "z_loss_coeff"):
        value = getattr(run.train, name)
        if value and run.preference.trains_on_pairs:
            instead = " (of pairs: --dpo-label-smoothing)" if name == "label_smoothing" else ""
            raise UserError(
                f"{flag_of(name)} {value:g} changes the loss of tokens, and --stage {run.preference.stage} "
                f"trains on pairs; leave it out{instead}"
            )
