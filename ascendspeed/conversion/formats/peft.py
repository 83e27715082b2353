"""Reads and writes adapter directories of peft: adapter_config.json and adapter_model.safetensors (or .bin),
plain LoRA only.
"""

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import chat_assets, model_card
from ascendspeed.conversion.formats.training_checkpoint.reading import adapter_of
from ascendspeed.conversion.load_files import load_pt, load_safetensors
from ascendspeed.conversion.output_files import (
    SAFETENSORS_TYPES,
    create_safetensors,
    nbytes,
    write_json,
)
from ascendspeed.models.lora import targets as lora_targets
from ascendspeed.models.lora.adapter import LoraAdapter, LoraPair
from ascendspeed.utils.atomic import draft_of, staged_folder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names
from ascendspeed.utils.safe_io import read_json_object
from ascendspeed.utils.text import shorten_list

CONFIG = "adapter_config.json"
LOADERS = {"adapter_model.safetensors": load_safetensors, "adapter_model.bin": load_pt}
BASE = "base_fingerprint.json"
FINGERPRINT = "fingerprint"
"""Entry of this project's own `BASE` file, which peft ignores: hash of the base weights
(`weights_identity.sampled`).
"""
PREFIX = "base_model.model."
SUPPORTED_ENTRIES = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
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
INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Values of `init_lora_weights` that leave the base weights unchanged."""


def open_adapter(path: str | Path, readers: Readers | None = None) -> LoraAdapter:
    """Reads the adapters in a directory of peft, or in a training checkpoint, which `readers` verify. Raises
    `UserError`.
    """
    folder = Path(path)
    if looks_like_checkpoint(folder):
        return adapter_of((readers or Readers()).open(folder))
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds no adapters: neither {CONFIG} of peft nor a training checkpoint")
    return read(folder)


# ---------------------------------------------------------------- reading


def read(folder: Path) -> LoraAdapter:
    """Reads a directory of peft. Raises `UserError` for what is damaged, superfluous, missing, or more than
    plain LoRA.
    """
    settings = read_json_object(folder / CONFIG)
    _check_settings(folder, settings)
    matrices: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    unknown = []
    for key, tensor in _load_tensors(folder).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        is_matrix = isinstance(tensor, Tensor) and tensor.dtype in SAFETENSORS_TYPES and tensor.dim() == 2
        if match and is_matrix:
            matrices[match[2]][match[1]] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"{folder} holds what is no matrix of a LoRA adapter: {shorten_list(sorted(unknown))}"
        )
    check_names(folder, matrices["A"], matrices["B"], of="an A and a B of every adapter")
    pairs = {
        name: LoraPair(a, matrices["B"][name], _scale(folder, settings, name, len(a)))
        for name, a in matrices["A"].items()
    }
    base = settings.get("base_model_name_or_path")
    template = chat_assets.recorded_template(folder)
    notes = model_card.recorded_section(folder)
    return LoraAdapter(folder, pairs, settings, base, _read_fingerprint(folder), template, str(folder), notes)


def check_complete(adapter: LoraAdapter, model: ModelConfig) -> None:
    """Raises `UserError` if adapters are missing that adapter_config.json lists."""
    for targets in lora_targets.naming_schemes(model):
        names = [target.hf_module.format(l=layer) for layer in range(model.num_layers) for target in targets]
        if not adapter.pairs.keys() & set(names):
            continue
        missing = [name for name in names if _is_listed(adapter, name) and name not in adapter.pairs]
        if missing:
            raise UserError(
                f"{adapter.path} lacks the adapters of {shorten_list(missing)}, which its {CONFIG} names"
            )


def _read_fingerprint(folder: Path) -> str | None:
    """Hash of the base weights, if the directory records it."""
    path = folder / BASE
    if not path.exists():
        return None
    fingerprint = read_json_object(path).get(FINGERPRINT)
    if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise UserError(
            f"{path} holds no fingerprint of weights: write the adapters again (tools/lora/export_lora.py)"
        )
    return fingerprint


def _load_tensors(folder: Path) -> dict[str, Any]:
    name = next((name for name in LOADERS if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{folder} has no weights: none of {', '.join(LOADERS)}")
    content = LOADERS[name](folder / name)
    if not isinstance(content, Mapping):
        raise UserError(f"{folder / name} holds a {type(content).__name__}, not a table of tensors")
    return dict(content)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises `UserError` for settings beyond plain LoRA, and for values of a wrong type."""
    path = folder / CONFIG
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {settings.get('peft_type')!r} is not supported, only 'LORA'")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {settings['bias']!r} is not supported, only 'none'")
    if settings.get("init_lora_weights", True) not in INITIALIZATIONS:
        raise UserError(
            f"{path}: init_lora_weights {settings['init_lora_weights']!r} changes the base weights: "
            "let peft save it as plain LoRA first"
        )
    for name, value in settings.items():
        if value and name not in SUPPORTED_ENTRIES | IRRELEVANT_ENTRIES:
            raise UserError(f"{path}: {name} = {value!r} is not supported, only plain LoRA is")
    for name, types, noun in (("r", int, "an integer"), ("lora_alpha", (int, float), "a number")):
        if not isinstance(settings.get(name), types) or isinstance(settings[name], bool):
            raise UserError(f"{path}: {name} must be {noun}, got {settings.get(name)!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict) or isinstance(settings.get(name), bool):
            raise UserError(f"{path}: {name} must be a table, got {settings[name]!r}")


def _scale(folder: Path, settings: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank of one module, each by the first pattern that matches the module, as in peft."""
    stated = _by_pattern(folder, settings.get("rank_pattern"), name, settings["r"])
    if stated != rank:
        raise UserError(f"{folder}: A of {name} has {rank} rows, but {CONFIG} says r = {stated}")
    alpha = _by_pattern(folder, settings.get("alpha_pattern"), name, settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(folder: Path, patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if _matches(folder, rf"(.*\.)?({pattern})", name):
            return value
    return default


def _matches(folder: Path, pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{folder / CONFIG}: {pattern!r} is no regular expression ({error})") from None


def _is_listed(adapter: LoraAdapter, name: str) -> bool:
    """True if adapter_config.json gives the module an adapter."""
    layers = adapter.settings.get("layers_to_transform")
    if layers is not None:
        layer = next(int(word) for word in name.split(".") if word.isdigit())
        if layer not in ([layers] if isinstance(layers, int) else layers):
            return False
    return _is_among(adapter, "target_modules", name) and not _is_among(adapter, "exclude_modules", name)


def _is_among(adapter: LoraAdapter, key: str, name: str) -> bool:
    words = adapter.settings.get(key)
    if isinstance(words, str):
        return words == lora_targets.ALL or _matches(adapter.path, words, name)
    return any(name == word or name.endswith(f".{word}") for word in words or ())


# ---------------------------------------------------------------- writing


def write(adapter: LoraAdapter, target: Path, base: str | None = None) -> None:
    """Writes a directory of peft atomically. `base`: folder of the base weights to record; None: the
    adapter's own.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b.contiguous()
    alpha = adapter.settings["lora_alpha"]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **adapter.settings,
        "base_model_name_or_path": base or adapter.base,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with staged_folder(target, sum(nbytes(*spec) for spec in specs.values()) + (1 << 20)) as folder:
        file = create_safetensors(folder / "adapter_model.safetensors", specs)
        for name, tensor in tensors.items():
            file.write(name, 0, tensor)
            file.done(name)
        write_json(folder / CONFIG, settings)
        if adapter.fingerprint:
            write_json(folder / BASE, {FINGERPRINT: adapter.fingerprint})
        if adapter.chat_template and adapter.tokenizer:
            chat_assets.write_for_adapter(folder, adapter.chat_template, adapter.tokenizer)
        if adapter.training_notes:
            (folder / model_card.FILE).write_text(model_card.adapter_text(adapter), encoding="utf-8")


def replace_with(adapter: LoraAdapter, target: Path) -> None:
    """Writes a directory of peft and replaces the one of an earlier step of the same run, which stays until
    the new one is complete.

    After a kill between the two renames, a complete directory is beside `target`; the next call moves it
    there first.
    """
    new = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    for complete in (new, old):  # both are complete if `target` is missing, and `new` is the newer one
        if complete.exists() and not target.exists():
            complete.rename(target)
    for leftover in (new, old, draft_of(new)):  # only this run writes here
        shutil.rmtree(leftover, ignore_errors=True)
    write(adapter, new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
