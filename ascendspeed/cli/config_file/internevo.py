"""Keys of InternEvo's training configuration (`config.py`)."""

from collections.abc import Mapping
from typing import Any

from ascendspeed.cli.config_file.rules import Only, Rule, Unused, translate
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError

ENGINE = Unused()
DTYPES = {"torch.bfloat16": {"bf16": True}, "torch.float16": {"fp16": True}, "torch.float32": {}}


def _local_path(value: Any) -> str | None:
    """Path of a `local:` address."""
    if value is None:
        return None
    scheme, colon, path = str(value).partition(":")
    if colon and scheme != "local":
        raise UserError("only local: paths; copy the folder to a disk of this machine")
    return path if colon else scheme


def _dtype(value: Any) -> dict[str, Any]:
    if value not in DTYPES:
        raise UserError(f"choose {', '.join(DTYPES)}")
    return DTYPES[value]


def _checkpoint(value: Any) -> dict[str, Any]:
    if value not in (0, 1, False, True):
        raise UserError("a share of the layers; use --recompute-granularity full --recompute-method block")
    return {"recompute_granularity": "full" if value else "none"}


def _size(value: Any) -> int:
    return value.get("size", 1) if isinstance(value, dict) else value


def _tensor(value: Any) -> dict[str, Any]:
    mode = value.get("mode", "mtp") if isinstance(value, dict) else "mtp"
    if mode not in ("mtp", "msp", "fsp"):
        raise UserError("mode: choose mtp, msp or fsp; there is no weight parallelism here")
    parallel = _size(value) > 1 and mode != "mtp"
    return {"tensor_model_parallel_size": _size(value), **({"sequence_parallel": True} if parallel else {})}


def _weight(value: Any) -> dict[str, Any]:
    if _size(value) not in (None, 1):
        raise UserError("there is no weight parallelism here; use --deepspeed --zero-stage 3")
    return {}


def _load(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    unknown = set(value) - {"path", "content", "ckpt_type"}
    if unknown:
        raise UserError(f"no meaning here: {', '.join(sorted(unknown))}")
    content = value.get("content", ("model",))
    content = [content] if isinstance(content, str) else list(content)
    return {"load": _local_path(value.get("path")), **({"finetune": True} if content == ["model"] else {})}


def _micro_num(value: Any) -> dict[str, Any]:
    return {"_micro_num": value}


def _ramp(value: Any) -> dict[str, Any]:
    """Start, increment and iterations of a ramp of batch sizes: micro-batches of a data-parallel rank."""
    if not value:
        return {}
    numbers = str(value).split()
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError('not START INCREMENT ITERATIONS, three positive numbers of one text: "4 2 100"')
    return {"_ramp": tuple(map(int, numbers))}


TOTAL = "set data.total_steps to this number; the schedule ends with the run"
RULES: dict[str, Rule] = {
    **dict.fromkeys(("JOB_NAME", "DO_ALERT", "monitor.*", "monitor", "alert_address"), ENGINE),
    **dict.fromkeys(("cudnn_deterministic", "cudnn_benchmark", "use_fp32_norm", "metric_dtype"), ENGINE),
    "model_type": lambda value: {"_model_type": value},
    "tensorboard_folder": "tensorboard_dir",
    "ckpt.enable_save_ckpt": lambda value: {"_save": value},
    "ckpt.save_ckpt_folder": lambda value: {"save": _local_path(value)},
    "ckpt.load_ckpt_info": _load,
    "ckpt.auto_resume": lambda value: {"auto_resume": True} if value else {},
    "ckpt.checkpoint_every": "save_interval",
    **dict.fromkeys(
        ("ckpt.async_upload_tmp_folder", "ckpt.oss_snapshot_freq", "ckpt.stop_file_path"),
        Unused("checkpoints are written to --save, with --async-save in the background"),
    ),
    "ckpt.async_upload": lambda value: {"async_save": True} if value else {},
    "data.type": Only(("tokenized",), "only tokenized data; preprocess with tools/preprocess_data.py"),
    "data.seq_len": "seq_length",
    "data.micro_num": _micro_num,
    "data.micro_bsz": "micro_batch_size",
    "data.valid_micro_num": "eval_iters",
    "data.valid_every": lambda value: {"eval_interval": value} if value else {},
    "data.pack_sample_into_one": lambda value: {"packing": "internevo-whole" if value else "internevo-cut"},
    "data.total_steps": "train_iters",
    "data.skip_batches": lambda value: {"skip_batches": value} if value else {},
    "data.rampup_batch_size": _ramp,
    "data.min_length": "min_length",
    "data.train_folder": lambda value: {"data_path": (value,)} if value else {},
    "data.valid_folder": lambda value: {"valid_data_path": (value,)} if value else {},
    "data.empty_cache_and_diag_interval": ENGINE,
    "data.diag_outlier_ratio": ENGINE,
    "data.train_one_epoch": Only((False,), "use --train-epochs 1"),
    "data.use_packed_dataset": Only((True,), "documents are packed"),
    "grad_scaler.fp16.initial_scale": lambda value: {"_scale": float(value)},
    "grad_scaler.*": ENGINE,
    "hybrid_zero_optimizer.clip_grad_norm": "clip_grad",
    "hybrid_zero_optimizer.*": ENGINE,
    "loss.label_smoothing": Only((0, None), "labels are not smoothed"),
    "adam.lr": "lr",
    "adam.adam_beta1": "adam_beta1",
    "adam.adam_beta2": "adam_beta2",
    "adam.adam_beta2_c": Only((0,), "the second beta is constant"),
    "adam.adam_eps": "adam_eps",
    "adam.weight_decay": "weight_decay",
    "lr_scheduler.total_steps": lambda value: {"lr_decay_iters": value},
    "lr_scheduler.init_steps": Only((0,), "the warm-up begins at once"),
    "lr_scheduler.warmup_ratio": "lr_warmup_fraction",
    "lr_scheduler.eta_min": "min_lr",
    "lr_scheduler.last_epoch": Only((-1,), "the schedule continues with the checkpoint"),
    "beta2_scheduler.*": ENGINE,
    "model.checkpoint": _checkpoint,
    "model.num_chunks": "num_virtual_stages_per_pipeline_rank",
    "model.num_attention_heads": "num_attention_heads",
    "model.num_kv_attention_heads": "num_query_groups",
    "model.hidden_size": "hidden_size",
    "model.num_layers": "num_layers",
    "model.vocab_size": "vocab_size",
    "model.mlp_ratio": lambda value: {"_mlp_ratio": value},
    "model.layer_norm_epsilon": "norm_epsilon",
    "model.rope_base": "rotary_base",
    "model.max_position_embeddings": "max_position_embeddings",
    "model.dtype": _dtype,
    "model.norm_type": Only(("rmsnorm",), "the norm is RMSNorm"),
    "model.apply_post_layer_norm": Only((False,), "the norms come before the layers"),
    "model.embed_grad_scale": Only((1, None), "gradients of the embedding are not scaled"),
    **dict.fromkeys(("model.embed_split_hidden", "model.parallel_output", "model.use_flash_attn"), ENGINE),
    **dict.fromkeys(("model.qk_interleaved", "model.no_bias", "model.multiple_of"), ENGINE),
    "parallel.zero1": lambda value: {"use_distributed_optimizer": True} if _size(value) != 1 else {},
    "parallel.tensor": _tensor,
    "parallel.pipeline": lambda value: {"pipeline_model_parallel_size": _size(value)},
    "parallel.weight": _weight,
    "parallel.sequence_parallel": lambda value: {"sequence_parallel": True} if value else {},
}


def fields_of(
    values: dict[str, Any], where: str, typed: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of a configuration, and notes. `typed`: fields that the command line sets, and their
    first words.

    Raises UserError for keys and values without an equivalent.
    """
    settings = {key: value for key, value in values.items() if not key.isupper()}  # capitals: its variables
    fields, notes = translate(settings, RULES, where, "InternEvo's")
    _derive_model(fields, where, typed)
    number = fields.pop("_micro_num", 1)
    if number != 1 and "global_batch_size" not in typed:
        raise UserError(
            f"{where}: data.micro_num = {number}: the global batch is micro_bsz x micro_num x data-parallel "
            "ranks; give it as --global-batch-size"
        )
    if ramp := fields.pop("_ramp", None):
        fields |= _ramp_of_samples(ramp, number, fields.get("micro_batch_size", 1), typed, where)
    if fields.pop("_save", True) is False:
        fields.pop("save", None)
        fields.pop("save_interval", None)
    scale = fields.pop("_scale", None)
    if fields.get("fp16") and scale:
        fields["initial_loss_scale"] = scale
    if "deepspeed" in typed:
        fields.pop("use_distributed_optimizer", None)  # ZeRO of the other engine
    return fields, notes


def _ramp_of_samples(
    ramp: tuple[int, int, int], micro_num: int, micro_bsz: int, typed: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Returns the ramp in samples of all ranks.

    Raises UserError for a ramp that InternEvo refuses, or that has no equal in samples.
    """
    start, increment, iterations = ramp
    key = f"{where}: data.rampup_batch_size = {start} {increment} {iterations}"
    if start > micro_num or (micro_num - start) % increment:
        raise UserError(
            f"{key}: steps of {increment} do not lead from {start} to data.micro_num = {micro_num}"
        )
    if start == micro_num:
        return {}
    full = typed["global_batch_size"]
    if not full.isdecimal():
        return {}  # the parser refuses it
    unit, rest = divmod(int(full), micro_num)
    if rest or unit % micro_bsz:
        raise UserError(
            f"{key} counts micro-batches of a data-parallel rank, but no number of ranks has "
            f"--global-batch-size {full}: choose a multiple of data.micro_num x data.micro_bsz = "
            f"{micro_num * micro_bsz}"
        )
    return {"rampup_batch_size_iters": (start * unit, increment * unit, iterations)}


def _derive_model(fields: dict[str, Any], where: str, typed: Mapping[str, str]) -> None:
    """Replaces the model type by a family, and the ratio of the MLP by its width."""
    ratio = fields.pop("_mlp_ratio", None)
    if ratio is not None and "hidden_size" in fields:
        fields["ffn_hidden_size"] = 256 * -(-int(fields["hidden_size"] * ratio) // 256)
    name = fields.pop("_model_type", "INTERNLM")
    families = [family.name for family in FAMILIES.values() if name in family.internevo_types]
    if "model" in typed:
        return
    if len(families) != 1:
        there = f"the models {', '.join(families)}" if families else "no model here"
        raise UserError(f"{where}: model_type = {name!r} is {there}; choose one with --model")
    fields["family"] = families[0]
