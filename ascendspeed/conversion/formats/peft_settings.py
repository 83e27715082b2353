"""Checks of adapter_config.json: kinds of adapters, types and ranges of every entry that is used."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed.utils.errors import UserError

CONFIG = "adapter_config.json"
MAX_SHOWN = 200
"""Characters of a value in a message."""
BIASES = ("none", "all", "lora_only")
INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Values of `init_lora_weights` that leave the base weights unchanged."""
USED_ENTRIES = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "modules_to_save",
    "trainable_token_indices",
    "init_lora_weights",
    "peft_type",
    "bias",
}
IRRELEVANT_ENTRIES = {
    "base_model_name_or_path",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "ensure_weight_tying",
}
"""Entries of adapter_config.json that do not change the result."""


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises `UserError` for settings that cannot be merged, and for values of a wrong type or range."""
    path = folder / CONFIG
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {_shown(settings.get('peft_type'))} is not supported, only 'LORA'"
        )
    if settings.get("bias", "none") not in BIASES:
        raise UserError(f"{path}: bias {_shown(settings['bias'])} is not one of {', '.join(BIASES)}")
    if not _is_in(settings.get("init_lora_weights", True), INITIALIZATIONS):
        raise UserError(
            f"{path}: init_lora_weights {_shown(settings['init_lora_weights'])} changes the base weights: "
            "let peft save it as plain LoRA first"
        )
    for name, value in settings.items():
        if value and name not in USED_ENTRIES | IRRELEVANT_ENTRIES:
            raise UserError(
                f"{path}: {name[:100]} = {_shown(value)} is not supported: merge it by peft's own "
                f"merge_and_unload, and load the result"
            )
    _check_types(path, settings)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def _is_in(value: Any, choices: Sequence[Any]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _check_types(path: Path, settings: Mapping[str, Any]) -> None:
    checks = (
        ("r", _is_rank, "a positive integer"),
        ("lora_alpha", _is_number, "a number"),
        ("rank_pattern", lambda value: _is_table(value, _is_rank), "a table of positive integers"),
        ("alpha_pattern", lambda value: _is_table(value, _is_number), "a table of numbers"),
        ("target_modules", _is_names, "a regular expression or a list of names"),
        ("exclude_modules", _is_names, "a regular expression or a list of names"),
        ("modules_to_save", lambda value: _is_list(value, _is_text), "a list of names"),
        ("layers_to_transform", _is_layers, "a layer or a list of layers"),
        ("trainable_token_indices", _is_tokens, "a list of token ids, or a table of module and list"),
        ("use_rslora", lambda value: isinstance(value, bool), "true or false"),
        ("use_dora", lambda value: isinstance(value, bool), "true or false"),
        ("base_model_name_or_path", _is_text, "a path"),
    )
    for name, is_valid, noun in checks:
        value = settings.get(name)
        is_required = name in ("r", "lora_alpha")
        if (value is None and is_required) or (value is not None and not is_valid(value)):
            raise UserError(f"{path}: {name} must be {noun}, got {_shown(value)}")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= 1e30 and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, is_valid: Any) -> bool:
    return isinstance(value, list) and all(map(is_valid, value))


def _is_table(value: Any, is_valid: Any) -> bool:
    return isinstance(value, dict) and all(map(is_valid, value.values()))


def _is_names(value: Any) -> bool:
    return _is_text(value) or _is_list(value, _is_text)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_layers(value: Any) -> bool:
    return _is_index(value) or _is_list(value, _is_index)


def _is_tokens(value: Any) -> bool:
    return _is_list(value, _is_index) or _is_table(value, lambda tokens: _is_list(tokens, _is_index))


def scale(folder: Path, settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of one module, each by the first pattern that matches the module, as in peft."""
    stated = _by_pattern(folder, settings.get("rank_pattern"), module, settings["r"])
    if stated != rank:
        raise UserError(f"{folder}: A of {module} has {rank} rows, but {CONFIG} says r = {stated}")
    alpha = _by_pattern(folder, settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(folder: Path, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if matches(folder, rf"(.*\.)?({pattern})", module):
            return value
    return default


def matches(folder: Path, pattern: str, module: str) -> bool:
    """True if a regular expression of adapter_config.json matches all of a module's name."""
    try:
        return re.fullmatch(pattern, module) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{folder / CONFIG}: {_shown(pattern)} is no regular expression ({error})") from None


def token_ids(settings: Mapping[str, Any], module: str) -> list[int]:
    """Ids whose rows of an embedding were trained by themselves; empty if the settings name none."""
    indices = settings.get("trainable_token_indices") or []
    if isinstance(indices, list):
        return indices
    return next((ids for name, ids in indices.items() if names_module(name, module)), [])


def names_module(word: str, module: str) -> bool:
    """True if a name of adapter_config.json means this module: all of its name, or its last parts."""
    return module == word or module.endswith(f".{word}")
