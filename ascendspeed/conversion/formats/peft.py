"""Reads and writes adapter directories of peft: adapter_config.json and adapter_model.safetensors (or .bin).

LoRA and DoRA of linears, of the embedding and of the output layer, whole tensors (`modules_to_save`, biases)
and trained rows of the embedding are read, to be merged; plain LoRA, and the head of a reward model, is
written.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import chat_assets, model_card
from ascendspeed.conversion.formats.peft_settings import (
    CONFIG,
    check_settings,
    matches,
    names_module,
    scale,
    token_ids,
)
from ascendspeed.conversion.formats.peft_tensors import PREFIX, AdapterTensors, sort_tensors
from ascendspeed.conversion.formats.training_checkpoint.reading import adapter_of
from ascendspeed.conversion.load_files import load_pt, load_safetensors
from ascendspeed.conversion.output_files import (
    create_safetensors,
    nbytes,
    write_json,
)
from ascendspeed.models.families.reward_head import TOKEN
from ascendspeed.models.lora import targets as lora_targets
from ascendspeed.models.lora.adapter import LoraAdapter, LoraPair, TokenRows
from ascendspeed.tokenization.chat.template_files import recorded_template
from ascendspeed.utils.atomic import draft_of, staged_folder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names
from ascendspeed.utils.safe_io import read_json_object
from ascendspeed.utils.text import shorten_list

LOADERS = {"adapter_model.safetensors": load_safetensors, "adapter_model.bin": load_pt}
BASE = "base_fingerprint.json"
FINGERPRINT = "fingerprint"
"""Entry of this project's own `BASE` file, which peft ignores: hash of the base weights
(`weights_identity.sampled`).
"""
CLASSIFIERS = {"classifier", "score"}
"""Entries that peft adds to `modules_to_save` of every sequence classifier, which has one of them."""


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
    """Reads a directory of peft. Raises `UserError` for what is damaged, superfluous, missing, or cannot be
    merged.
    """
    settings = read_json_object(folder / CONFIG)
    check_settings(folder, settings)
    found = sort_tensors(folder, _load_tensors(folder))
    pairs = {
        module: LoraPair(
            a,
            found.b[module],
            scale(folder, settings, module, len(a)),
            found.magnitudes.get(module),
            module in found.embeddings,
        )
        for module, a in found.a.items()
    }
    rows = {
        module: TokenRows(torch.tensor(token_ids(settings, module), dtype=torch.int64), tensor)
        for module, tensor in found.rows.items()
    }
    _check_parts(folder, settings, pairs, found)
    base = settings.get("base_model_name_or_path")
    return LoraAdapter(
        folder,
        pairs,
        settings,
        base,
        _read_fingerprint(folder),
        chat_template=recorded_template(folder),
        tokenizer=str(folder),
        training_notes=model_card.recorded_section(folder),
        replaced=found.whole,
        scored_token_id=_read_token(folder),
        token_rows=rows,
    )


def _check_parts(
    folder: Path, settings: dict[str, Any], pairs: dict[str, LoraPair], found: AdapterTensors
) -> None:
    """Raises `UserError` if the tensors are not those of the kinds that the settings name."""
    dora = set(pairs) if settings.get("use_dora") else set()
    check_names(folder, dora, found.magnitudes, of="a DoRA magnitude of every adapter")
    stored = {name.rpartition(".")[0] for name in found.whole}
    optional = CLASSIFIERS if settings.get("task_type") == "SEQ_CLS" and CLASSIFIERS & stored else set()
    for word in settings.get("modules_to_save") or []:
        if word not in optional and not any(
            names_module(word, module) or f".{word}." in f".{module}." for module in stored
        ):
            raise UserError(f"{folder} lacks {word!r}, which modules_to_save of its {CONFIG} names")
    if settings.get("trainable_token_indices") and not found.rows:
        raise UserError(f"{folder} lacks the rows of trainable_token_indices, which its {CONFIG} names")


def check_complete(adapter: LoraAdapter, model: ModelConfig) -> None:
    """Raises `UserError` if adapters are missing that adapter_config.json lists."""
    words = adapter.settings.get("target_modules")
    for word in words if isinstance(words, list) else ():
        of_vocabulary = any(names_module(word, module) for module in lora_targets.VOCABULARY_MODULES)
        if of_vocabulary and not any(names_module(word, module) for module in adapter.pairs):
            raise UserError(f"{adapter.path} lacks the adapters of {word}, which its {CONFIG} names")
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
    fingerprint = _read_own(folder).get(FINGERPRINT)
    if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise UserError(
            f"{path} holds no fingerprint of weights: write the adapters again (tools/lora/export_lora.py)"
        )
    return fingerprint


def _read_token(folder: Path) -> int | None:
    """Token at which a reward model's score is read, if the directory records it."""
    token = _read_own(folder).get(TOKEN)
    if token is not None and not (type(token) is int and token >= 0):
        raise UserError(f"{folder / BASE}: {TOKEN} = {token!r} is not the id of a token")
    return token


def _read_own(folder: Path) -> dict[str, Any]:
    """Entries of this project's own file; none if another program wrote the directory."""
    path = folder / BASE
    return read_json_object(path) if path.exists() else {}


def _load_tensors(folder: Path) -> dict[str, Any]:
    name = next((name for name in LOADERS if (folder / name).exists()), None)
    if name is None:
        raise UserError(f"{folder} has no weights: none of {', '.join(LOADERS)}")
    content = LOADERS[name](folder / name)
    if not isinstance(content, Mapping):
        raise UserError(f"{folder / name} holds a {type(content).__name__}, not a table of tensors")
    return dict(content)


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
        return words == lora_targets.ALL or matches(adapter.path, words, name)
    return any(names_module(word, name) for word in words or ())


# ---------------------------------------------------------------- writing


def write(adapter: LoraAdapter, target: Path, base: str | None = None) -> None:
    """Writes a directory of peft atomically. `base`: folder of the base weights to record; None: the
    adapter's own.
    """
    adapter.require_plain("written as adapters")
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b.contiguous()
    for name, tensor in adapter.replaced.items():
        tensors[f"{PREFIX}{name}"] = tensor.contiguous()
    alpha = adapter.settings["lora_alpha"]
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if adapter.has_reward_head else "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **adapter.settings,
        "modules_to_save": [name.removesuffix(".weight") for name in adapter.replaced] or None,
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
            token = {} if adapter.scored_token_id is None else {TOKEN: adapter.scored_token_id}
            write_json(folder / BASE, {FINGERPRINT: adapter.fingerprint, **token})
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
