"""Keys of MindFormers' run configuration (`run_internlm_7b.yaml`)."""

from typing import Any

from ascendspeed.cli.config_file.rules import Only, Rule, Unused, translate
from ascendspeed.utils.errors import UserError

SECTIONS = {"runner_config", "parallel_config", "trainer", "model"}
"""Sections that show whose file it is: any two of them."""
SILENT = Unused()
SCHEDULES = {
    "cosine": ("CosineWithWarmUpLR", "CosineAnnealingLR", "cosine"),
    "linear": ("LinearWithWarmUpLR", "linear"),
    "constant": ("ConstantWarmUpLR", "ConstantWithWarmUpLR", "constant"),
}
DTYPES = {"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": {}}
MODEL = "model.model_config"
DATA_FORMAT = "MindRecord files are not read; preprocess the data, and give --data-path"


def _schedule(value: Any) -> dict[str, Any]:
    for style, names in SCHEDULES.items():
        if value in names:
            return {"lr_decay_style": style}
    raise UserError(f"choose {', '.join(name for names in SCHEDULES.values() for name in names)}")


def _dtype(value: Any) -> dict[str, Any]:
    if value not in DTYPES:
        raise UserError(f"choose {', '.join(DTYPES)}")
    return DTYPES[value]


def _betas(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError("two numbers")
    return {"adam_beta1": value[0], "adam_beta2": value[1]}


UNUSED_MODEL_TEXT = """
multiple_of bos_token_id eos_token_id pad_token_id ignore_token_id layernorm_compute_type
layernorm_compute_dtype softmax_compute_type softmax_compute_dtype rotary_dtype rotary_emb_type
param_init_type param_init_dtype use_past use_flash_attention block_size num_blocks offset is_dynamic
fine_grain_interleave qkv_concat parallel_optimizer has_bias qkv_has_bias wo_has_bias extend_method
scaling_factor repetition_penalty max_decode_length top_k top_p do_sample max_new_tokens temperature
embedding_init_type use_attn_mask_compression
"""
UNUSED_MODEL_KEYS = UNUSED_MODEL_TEXT.split()
"""Biases come with the family; the others are for generation, kernels or number formats of MindSpore."""

RULES: dict[str, Rule] = {
    "seed": "seed",
    "load_checkpoint": lambda value: {"load": value} if value else {},
    "output_dir": lambda value: {"save": value} if value else {},
    "resume_training": lambda value: {"auto_resume": True} if value else {},
    **dict.fromkeys(("run_mode", "use_parallel", "auto_trans_ckpt", "only_save_strategy"), SILENT),
    **dict.fromkeys(("src_strategy_path_or_dir", "transform_process_num", "remove_redundancy"), SILENT),
    **dict.fromkeys(
        ("load_ckpt_format", "load_ckpt_async", "use_past", "auto_tune", "filepath_prefix"), SILENT
    ),
    **dict.fromkeys(("autotune_per_step", "profile", "profile_start_step", "profile_stop_step"), SILENT),
    **dict.fromkeys(("init_start_profile", "profile_communication", "profile_memory"), SILENT),
    **dict.fromkeys(("do_eval", "eval_step_interval", "eval_epoch_interval", "remote_save_url"), SILENT),
    **dict.fromkeys(("context.*", "callbacks", "eval_callbacks", "moe_config.*", "trainer.*"), SILENT),
    **dict.fromkeys(("eval_dataset.*", "eval_dataset_task.*", "metric.*", "metric", "infer.*"), SILENT),
    **dict.fromkeys(("processor.*", "runner_wrapper.*", "layer_decay", "layer_scale", "lr_scale"), SILENT),
    "lr_scale_factor": SILENT,
    "runner_config.epochs": "train_epochs",
    "runner_config.batch_size": "micro_batch_size",
    "runner_config.gradient_accumulation_steps": lambda value: {"_accumulation": value},
    "runner_config.*": SILENT,
    "optimizer.type": Only(("AdamW", "FP32StateAdamWeightDecay", "FusedAdamWeightDecay"), "only AdamW"),
    "optimizer.betas": _betas,
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_eps",
    "optimizer.learning_rate": "lr",
    "optimizer.weight_decay": "weight_decay",
    "lr_schedule.type": _schedule,
    "lr_schedule.learning_rate": "lr",
    "lr_schedule.lr_end": "min_lr",
    "lr_schedule.warmup_ratio": "lr_warmup_fraction",
    "lr_schedule.warmup_steps": "lr_warmup_iters",
    "lr_schedule.total_steps": lambda value: {"lr_decay_iters": value} if value and value > 0 else {},
    "train_dataset.data_loader.type": SILENT,
    "train_dataset.data_loader.dataset_dir": Only(("", None), DATA_FORMAT),
    "train_dataset.seed": SILENT,
    "train_dataset.*": SILENT,
    "train_dataset_task.*": SILENT,
    "parallel.*": SILENT,
    "parallel_config.model_parallel": "tensor_model_parallel_size",
    "parallel_config.pipeline_stage": "pipeline_model_parallel_size",
    "parallel_config.context_parallel": "context_parallel_size",
    "parallel_config.expert_parallel": "expert_model_parallel_size",
    "parallel_config.use_seq_parallel": lambda value: {"sequence_parallel": True} if value else {},
    "parallel_config.micro_batch_num": lambda value: {"_micro_batches": value},
    "parallel_config.data_parallel": lambda value: {"_data_parallel": value},
    "parallel_config.optimizer_shard": SILENT,
    "parallel_config.vocab_emb_dp": SILENT,
    "parallel_config.gradient_aggregation_group": SILENT,
    "micro_batch_interleave_num": SILENT,
    "recompute_config.recompute": lambda value: {"recompute_granularity": "full"} if value is True else {},
    "recompute_config.*": SILENT,
    f"{MODEL}.type": SILENT,
    "model.arch.type": SILENT,
    f"{MODEL}.batch_size": SILENT,
    f"{MODEL}.seq_length": "seq_length",
    f"{MODEL}.hidden_size": "hidden_size",
    f"{MODEL}.num_layers": "num_layers",
    f"{MODEL}.num_heads": "num_attention_heads",
    f"{MODEL}.n_kv_heads": "num_query_groups",
    f"{MODEL}.vocab_size": "vocab_size",
    f"{MODEL}.intermediate_size": "ffn_hidden_size",
    f"{MODEL}.max_position_embedding": "max_position_embeddings",
    f"{MODEL}.max_position_embeddings": "max_position_embeddings",
    f"{MODEL}.rms_norm_eps": "norm_epsilon",
    f"{MODEL}.theta": "rotary_base",
    f"{MODEL}.compute_dtype": _dtype,
    f"{MODEL}.checkpoint_name_or_path": lambda value: {"load": value} if value else {},
    **{f"{MODEL}.{name}": SILENT for name in UNUSED_MODEL_KEYS},
}


def is_mindformers(values: dict[str, Any]) -> bool:
    """True for the sections of MindFormers' file."""
    return len(SECTIONS & values.keys()) > 1 and ("runner_config" in values or "trainer" in values)


def fields_of(values: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of a configuration, and notes.

    Raises UserError for keys and values without an equivalent.
    """
    fields, notes = translate(values, RULES, where, "MindFormers'")
    data_parallel = fields.pop("_data_parallel", None)
    micro_batches = fields.pop("_micro_batches", 1)
    accumulation = fields.pop("_accumulation", None) or 1
    if fields.get("pipeline_model_parallel_size", 1) == 1:
        micro_batches = 1  # only pipelines have them there
    if data_parallel:
        size = fields.get("micro_batch_size", 1) * data_parallel * micro_batches * accumulation
        fields["global_batch_size"] = size
    notes.append(f"{where}: the architecture is that of --load or --model, with the sizes of the file")
    return fields, notes
