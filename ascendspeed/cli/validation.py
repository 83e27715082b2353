"""Validation of a run before any process group exists. No torch."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from ascendspeed.cli.command import check_precision
from ascendspeed.cli.kernel_checks import check_compile, check_fp8, check_triton
from ascendspeed.cli.observation_checks import check_eval_tasks, check_profile
from ascendspeed.cli.optimizer_checks import check_muon, check_safeguards, check_split_masters
from ascendspeed.cli.parser import flag_of
from ascendspeed.config import batch_schedule, lr_schedule, schema
from ascendspeed.config.pipeline_stages import pipeline_stage_layers
from ascendspeed.config.schema import ModelConfig, ParallelConfig, PreferenceConfig, Run
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import check_experts, check_heads
from ascendspeed.models.families.rope_config import check_rope
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
    _check_quantization(run)
    _check_fsdp(run)
    _check_model(run)
    _check_engine(run.parallel)
    check_muon(run)
    check_split_masters(run)
    check_safeguards(run)
    check_profile(run.train)
    check_triton(run.train)
    check_compile(run)
    check_fp8(run)
    check_eval_tasks(run, world)
    if world is not None:
        _check_world(run, world)
    _check_recompute(run)


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


def _check_model(run: Run) -> None:
    """Raises UserError for an inconsistent architecture, or one that does not split over the ranks."""
    model = run.model
    parallel = run.parallel
    check_heads(model)
    check_rope(model)
    schema.check_tensor_parallel(model, parallel.tensor_model_parallel_size)
    pipeline_stage_layers(model.num_layers, parallel)
    _check_head_exchange(model, parallel)
    _check_experts(run)
    _check_biases(model)


def _check_head_exchange(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises UserError if context-parallel ranks cannot exchange positions for heads."""
    if parallel.cp_comm_type != "a2a":
        return
    cp = parallel.context_parallel_size
    if cp == 1:
        raise UserError("--cp-comm-type a2a needs --context-parallel-size above 1; add it")
    tp = parallel.tensor_model_parallel_size
    groups = max(1, model.kv_heads // tp)
    if groups % cp:
        per_rank = f" / TP {tp} = {groups}" if tp > 1 else ""
        raise UserError(
            f"--cp-comm-type a2a: {model.kv_heads} key/value heads{per_rank} do not split over "
            f"{cp} context-parallel ranks; choose --context-parallel-size {_divisors(groups)}, or "
            "--cp-comm-type allgather"
        )


def _check_experts(run: Run) -> None:
    """Raises UserError if the number of experts does not fit the family or the layout."""
    model = run.model
    parallel = run.parallel
    ranks = parallel.expert_model_parallel_size
    check_experts(model)
    mappings = FAMILIES[model.family].param_mappings
    family_has_experts = any("{e}" in mapping.megatron_param for mapping in mappings)
    if (model.num_experts is not None) != family_has_experts:
        has = "always has" if model.num_experts is None else "never has"
        raise UserError(
            f"--num-experts {model.num_experts}: a model of the family {model.family} {has} experts"
        )
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if getattr(model, name) and not model.num_experts:
            raise UserError(
                f"{flag_of(name)} {getattr(model, name):g}: only a model with experts has a router"
            )
    if ranks > 1 and (model.num_experts or 1) % ranks:
        has = f"{model.num_experts} experts do" if model.num_experts else "a model without experts does"
        choices = _divisors(model.num_experts or 1)
        raise UserError(f"{has} not split over {ranks} expert-parallel ranks; choose {choices}")
    if model.num_experts and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            "experts under tensor parallel train wrongly without sequence parallel; add --sequence-parallel"
        )


def _check_biases(model: ModelConfig) -> None:
    """Raises UserError for a bias or norm that checkpoints of the family cannot hold."""
    family = FAMILIES[model.family]
    mappings = family.param_mappings
    if model.qk_layernorm != family.implicit_config.get("qk_layernorm", False):
        has = "have no norms of query and key heads" if model.qk_layernorm else "have them"
        raise UserError(
            f"--{'' if model.qk_layernorm else 'no-'}qk-layernorm: the models of the family "
            f"{model.family} {has}; leave it out"
        )
    for name in ("add_qkv_bias", "add_dense_bias", "add_mlp_bias"):
        if getattr(model, name) and not any(mapping.condition == name for mapping in mappings):
            raise UserError(
                f"{flag_of(name)}: the models of the family {model.family} have no such bias; leave it out"
            )


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


def _check_quantization(run: Run) -> None:
    """Raises UserError for a quantised base whose weights would be partitioned."""
    if run.lora.quantization_bit is None:
        return
    flag = f"--quantization-bit {run.lora.quantization_bit}"
    if run.parallel.deepspeed and run.parallel.zero_stage == 3:
        raise UserError(
            f"{flag}: --zero-stage 3 partitions weights in the type of the run; use stage 0, 1 or 2"
        )
    if run.lora.quantization_bit == 4:
        _check_nf4_blocks(run)


def _check_nf4_blocks(run: Run) -> None:
    """Raises UserError if a linear's inputs on a rank cannot be divided into blocks of NF4."""
    model, tp = run.model, run.parallel.tensor_model_parallel_size
    cut = {"attention": model.num_attention_heads * model.head_dim}
    cut |= {f"an MLP of {width}": width for width in model.ffn_widths}
    widths = {"hidden_size": model.hidden_size, **{name: width // tp for name, width in cut.items()}}
    for name, width in widths.items():
        if width % schema.NF4_BLOCK:
            raise UserError(
                f"--quantization-bit 4 has a scale for every {schema.NF4_BLOCK} inputs, and {name} has "
                f"{width} on a rank (TP {tp}); use --quantization-bit 8"
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


MEGATRON_ONLY = {
    "pipeline_model_parallel_size": "has no pipeline stages (ZeRO-2 and 3 cannot have them); "
    "use 1 and a higher TP or ZeRO stage",
    "expert_model_parallel_size": "does not share experts; use 1 and ZeRO-3",
    "decoder_first_pipeline_num_layers": "has no pipeline stages; leave it out",
    "decoder_last_pipeline_num_layers": "has no pipeline stages; leave it out",
    "num_distributed_optimizer_instances": "shards the states of ZeRO-1 and 2 over all replicas; use 1",
    "use_distributed_optimizer": "has ZeRO; use --zero-stage 1",
    "use_torch_fsdp2": "shards the same by --zero-stage 3; use that",
    "overlap_grad_reduce": 'overlaps by itself ("overlap_comm" in --deepspeed_config)',
    "overlap_param_gather": 'overlaps by itself ("overlap_comm" in --deepspeed_config)',
}
"""Fields that the DeepSpeed engine does not support -> the reason and the alternative."""
DEEPSPEED_ONLY = ("deepspeed_config", "zero_hpz_partition_size", "zero_offload", "zero_offload_nvme_path")


def _flags_set(parallel: ParallelConfig, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (field, flag with its value) of the fields in `names` that do not have their default."""
    default = ParallelConfig()
    for name in names:
        value = getattr(parallel, name)
        if value != getattr(default, name):
            yield name, flag_of(name) + (f" {value}" if value is not True else "")


def _check_engine(parallel: ParallelConfig) -> None:
    """Raises UserError for flags that the engine of the run does not support."""
    if parallel.deepspeed:
        for name, flag in _flags_set(parallel, MEGATRON_ONLY):
            raise UserError(
                f"{flag}: the DeepSpeed engine {MEGATRON_ONLY[name]}, or drop --deepspeed for Megatron's "
                "engine"
            )
        _check_zero(parallel)
        return
    for _, flag in _flags_set(parallel, DEEPSPEED_ONLY):
        raise UserError(f"{flag}: only the DeepSpeed engine has it; add --deepspeed, or leave it out")
    overlaps = parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    if parallel.overlap_param_gather and not overlaps:
        raise UserError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them"
        )
    instances = parallel.num_distributed_optimizer_instances
    if instances > 1 and not parallel.use_distributed_optimizer:
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} needs --use-distributed-optimizer; add it"
        )
    if instances > 1 and parallel.overlap_grad_reduce:
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} does not go with --overlap-grad-reduce; "
            "leave one of them out"
        )


WITHOUT_FSDP = {
    "tensor_model_parallel_size": "use 1",
    "pipeline_model_parallel_size": "use 1",
    "expert_model_parallel_size": "use 1",
    "use_distributed_optimizer": "FSDP shards the optimizer states too: leave it out",
    "overlap_grad_reduce": "FSDP overlaps by itself: leave it out",
}
"""Fields that do not go with --use-torch-fsdp2 -> the alternative."""


def _check_fsdp(run: Run) -> None:
    """Raises UserError for settings that FSDP2 does not support."""
    if not run.parallel.use_torch_fsdp2:
        return
    for name, flag in _flags_set(run.parallel, WITHOUT_FSDP):
        raise UserError(f"--use-torch-fsdp2 does not go with {flag}; {WITHOUT_FSDP[name]}")
    if run.optim.fp16:
        raise UserError("--use-torch-fsdp2 has no loss scale for --fp16; use --bf16")
    if run.optim.optimizer == "muon":
        raise UserError("--use-torch-fsdp2 shards by rows, and --optimizer muon needs more; use adamw")
    if run.lora.quantization_bit:
        raise UserError("--use-torch-fsdp2 shards weights as they are; leave --quantization-bit out")


def _check_zero(parallel: ParallelConfig) -> None:
    """Raises UserError for features of ZeRO that the stage or the layout does not support."""
    stage = parallel.zero_stage
    offload = parallel.zero_offload
    partition = parallel.zero_hpz_partition_size
    if partition > 1 and (stage != 3 or parallel.tensor_model_parallel_size > 1):
        layout = f"{stage} and TP {parallel.tensor_model_parallel_size}"
        raise UserError(f"--zero-hpz-partition-size {partition} needs --zero-stage 3 and TP 1, not {layout}")
    if offload != "none" and stage < (3 if offload == "nvme" else 1):
        stages = "3" if offload == "nvme" else "1, 2 or 3"
        raise UserError(f"--zero-offload {offload} needs --zero-stage {stages}, not {stage}")
    if (offload == "nvme") != (parallel.zero_offload_nvme_path is not None):
        raise UserError(
            "--zero-offload nvme and --zero-offload-nvme-path, a folder on a local disk, belong together; "
            "give both"
        )


def _check_world(run: Run, world: int) -> None:
    """Raises UserError if `world` processes cannot share the model, the sequence or the batch evenly."""
    parallel = run.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    model_size = parallel.model_size
    if world % model_size:
        raise UserError(
            f"{world} processes do not split into groups of {model_size} for {layout}; "
            f"start a multiple of {model_size} (NPROC={model_size})"
        )
    dp = world // model_size
    cp = parallel.context_parallel_size
    ep = parallel.expert_model_parallel_size
    if (dp * cp) % ep:
        raise UserError(
            f"--expert-model-parallel-size {ep}: the {dp * cp} ranks (DP {dp} x CP {cp}) that could share "
            "experts "
            f"do not split into groups of {ep}; choose {_divisors(dp * cp)} or start more processes"
        )
    _check_optimizer_instances(parallel.num_distributed_optimizer_instances, dp * cp, dp * cp // ep)
    partition = parallel.zero_hpz_partition_size
    if (dp * cp) % partition:
        raise UserError(
            f"--zero-hpz-partition-size {partition} does not divide {dp * cp} ranks (DP {dp} x CP {cp}); "
            f"choose {_divisors(dp * cp)}"
        )
    _check_sequence(run.data.seq_length, parallel)
    micro_batch = run.train.micro_batch_size
    samples = micro_batch * dp  # of one micro-batch on all ranks
    for global_batch in reversed(batch_schedule.batch_sizes(run.train)):
        if global_batch % samples:
            flag = "--rampup-batch-size" if run.train.rampup_batch_size else "--rampup-batch-size-iters"
            ramp = "" if global_batch == run.train.global_batch_size else f" (of {flag})"
            raise UserError(
                f"--global-batch-size {global_batch}{ramp} is not a multiple of --micro-batch-size "
                f"{micro_batch} x {dp} data-parallel ranks = {samples}; choose "
                f"{_multiples(global_batch, samples)}"
            )
        _check_virtual_stages(parallel, global_batch // samples, samples)


def _check_optimizer_instances(instances: int, replicas: int, expert_replicas: int) -> None:
    """Raises UserError if the replicas, of the model and of its experts, do not split into `instances`."""
    common = math.gcd(replicas, expert_replicas)
    if common % instances:
        experts = f", {expert_replicas} of the experts" if expert_replicas != replicas else ""
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} does not divide the {replicas} replicas "
            f"(DP x CP){experts}; choose {_divisors(common)}"
        )


def _check_sequence(length: int, parallel: ParallelConfig) -> None:
    """Raises UserError if context- or sequence-parallel ranks cannot share a sequence evenly."""
    tp = parallel.tensor_model_parallel_size
    cp = parallel.context_parallel_size
    multiple = math.lcm(2 * cp if cp > 1 else 1, cp * tp if parallel.sequence_parallel else 1)
    if cp > 1 and length % (2 * cp):
        chunks = f"2 x CP = {2 * cp} chunks for --context-parallel-size {cp}"
        raise UserError(
            f"--seq-length {length} does not split into {chunks}; choose {_multiples(length, multiple)}"
        )
    if parallel.sequence_parallel and length // cp % tp:
        part = f"--seq-length {length}" + (f" / CP {cp} = {length // cp}" if cp > 1 else "")
        raise UserError(
            f"{part} does not split over {tp} ranks for --sequence-parallel; "
            f"choose {_multiples(length, multiple)}"
        )


def _check_virtual_stages(parallel: ParallelConfig, micro_batches: int, samples: int) -> None:
    """Raises UserError if virtual stages lack pipeline stages, or micro-batches (of `samples`) for them."""
    pp = parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    if virtual > 1 and pp == 1:
        flag = f"--num-virtual-stages-per-pipeline-rank {virtual}"
        raise UserError(f"{flag} needs pipeline stages: set --pipeline-model-parallel-size, or leave it out")
    if virtual > 1 and micro_batches % pp:
        raise UserError(
            f"{micro_batches} micro-batches per iteration are not a multiple of {pp} pipeline stages, as "
            "virtual "
            f"stages need; choose a --global-batch-size that is a multiple of {samples * pp}"
        )


def _check_recompute(run: Run) -> None:
    """Raises UserError if the recomputed layers are not those of a (virtual) pipeline stage."""
    train = run.train
    parallel = run.parallel
    method = train.recompute_method
    number = train.recompute_num_layers
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    stages = pipeline_stage_layers(run.model.num_layers, parallel)
    layers = math.gcd(*stages) // virtual if method == "uniform" else max(stages) // virtual
    if train.recompute_granularity != "full":
        if (method, number) != ("uniform", 1):
            raise UserError(
                "--recompute-method and --recompute-num-layers belong to --recompute-granularity full; add it"
            )
    elif method == "uniform" and layers % number:
        raise UserError(
            f"--recompute-num-layers {number} does not divide the {layers} layers of a (virtual) pipeline "
            "stage; "
            f"choose {_divisors(layers)}"
        )
    elif method == "block" and number > layers:
        raise UserError(
            f"--recompute-num-layers {number} is more than the {layers} layers of a (virtual) pipeline "
            "stage; "
            f"choose 1 to {layers}"
        )


def _multiples(number: int, divisor: int) -> str:
    """Returns the nearest multiples of `divisor` around `number`, as text."""
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def _divisors(number: int) -> str:
    """Returns the divisors of `number`, as text."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
