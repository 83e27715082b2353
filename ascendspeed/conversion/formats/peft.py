"""Adapter directories of peft: adapter_config.json and adapter_model.safetensors (or .bin). What is not plain LoRA is refused."""

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
from ascendspeed.conversion.checkpoint_reader import check_names
from ascendspeed.conversion.load_files import load_pt, load_safetensors
from ascendspeed.conversion.lora_adapter import Adapter, Pair, of_checkpoint
from ascendspeed.conversion.output_files import (
    SAFETENSORS_TYPES,
    create_safetensors,
    nbytes,
    write_json,
)
from ascendspeed.models.lora import targets as adapters
from ascendspeed.utils.atomic import draft_of, staged_folder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object
from ascendspeed.utils.text import shorten_list

CONFIG, WEIGHTS = (
    "adapter_config.json",
    {"adapter_model.safetensors": load_safetensors, "adapter_model.bin": load_pt},
)
BASE, FINGERPRINT = "base_fingerprint.json", "fingerprint"
"""Ours, which peft does not look at: the weights that the adapters were trained on, as `Source.fingerprint` knows them."""
PREFIX = "base_model.model."
UNDERSTOOD = {
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
    ),
    *("layers_to_transform", "init_lora_weights", "peft_type"),
}
NOT_NUMBERS = {  # what says nothing of the numbers
    *(
        "base_model_name_or_path",
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
        "layers_pattern",
    ),
    *("megatron_core", "qalora_group_size", "runtime_config", "eva_config", "ensure_weight_tying"),
}
INITIAL = (True, False, "gaussian", "eva", "orthogonal", None)
"""Ways to begin that leave the weights beneath as they are."""


def open_adapter(path: str | Path, readers: Readers | None = None) -> Adapter:
    """The adapters in a directory of peft, or in a training checkpoint, which `readers` verify. Raises `UserError`."""
    folder = Path(path)
    if looks_like_checkpoint(folder):
        return of_checkpoint((readers or Readers()).open(folder))
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds no adapters: neither {CONFIG} of peft nor a training checkpoint")
    return read(folder)


def read(folder: Path) -> Adapter:
    """A directory of peft. Raises `UserError` for what is damaged, left over, missing, or more than plain LoRA."""
    settings = read_json_object(folder / CONFIG)
    _refuse(folder, settings)
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    odd = []
    for key, tensor in _tensors(folder).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if (
            not match
            or not isinstance(tensor, Tensor)
            or tensor.dtype not in SAFETENSORS_TYPES
            or tensor.dim() != 2
        ):
            odd.append(key)
        else:
            halves[match[2]][match[1]] = tensor
    if odd:
        raise UserError(f"{folder} holds what is no matrix of a LoRA adapter: {shorten_list(sorted(odd))}")
    check_names(folder, halves["A"], halves["B"], of="an A and a B of every adapter")
    pairs = {
        name: Pair(a, halves["B"][name], _scale(folder, settings, name, len(a)))
        for name, a in halves["A"].items()
    }
    return Adapter(folder, pairs, settings, settings.get("base_model_name_or_path"), _fingerprint(folder))


def check_complete(adapter: Adapter, model: ModelConfig) -> None:
    """Raises `UserError` when adapters are missing that adapter_config.json says there are."""
    for targets in adapters.naming_schemes(model):
        names = [target.hf_module.format(l=layer) for layer in range(model.num_layers) for target in targets]
        if adapter.pairs.keys() & set(names):
            said = [name for name in names if _targeted(adapter, name)]
            if missing := [name for name in said if name not in adapter.pairs]:
                raise UserError(
                    f"{adapter.where} lacks the adapters of {shorten_list(missing)}, which its {CONFIG} names"
                )


def write(adapter: Adapter, target: Path, base: str | None = None) -> None:
    """A directory of peft, whole or not there. `base`: of the weights, in place of where they lay; None: the same."""
    halves = {
        f"{name}.lora_{which}": x
        for name, pair in adapter.pairs.items()
        for which, x in (("A", pair.a), ("B", pair.b))
    }
    tensors = {f"{PREFIX}{name}.weight": x.contiguous() for name, x in halves.items()}
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
    specs = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    with staged_folder(target, sum(nbytes(*spec) for spec in specs.values()) + (1 << 20)) as folder:
        file = create_safetensors(folder / "adapter_model.safetensors", specs)
        for name, x in tensors.items():
            file.write(name, 0, x)
            file.done(name)
        write_json(folder / CONFIG, settings)
        if adapter.fingerprint:
            write_json(folder / BASE, {FINGERPRINT: adapter.fingerprint})


def replace_with(adapter: Adapter, target: Path) -> None:
    """Writes it where an older one of the same run may lie, which stays until the new one is whole.

    A whole one is in `target`, or beside it after a kill between two renames; the next call then puts it there first.
    """
    new, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for kept in (new, old):  # beside a target that is gone each is whole, and the first is the newer one
        if kept.exists() and not target.exists():
            kept.rename(target)
    for left in (new, old, draft_of(new)):  # nobody but this run writes here
        shutil.rmtree(left, ignore_errors=True)
    write(adapter, new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _fingerprint(folder: Path) -> str | None:
    """Of the weights beneath, where somebody has written it."""
    path = folder / BASE
    if not path.exists():
        return None
    found = read_json_object(path).get(FINGERPRINT)
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{64}", found):
        raise UserError(
            f"{path} holds no fingerprint of weights: write the adapters again (tools/lora/export_lora.py)"
        )
    return found


def _tensors(folder: Path) -> dict[str, Any]:
    found = [name for name in WEIGHTS if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")
    held = WEIGHTS[found[0]](folder / found[0])
    if not isinstance(held, Mapping):
        raise UserError(f"{folder / found[0]} holds a {type(held).__name__}, not a table of tensors")
    return dict(held)


def _refuse(folder: Path, settings: dict[str, Any]) -> None:
    where = f"{folder / CONFIG}:"
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{where} peft_type {settings.get('peft_type')!r} is not supported, only 'LORA'")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{where} bias {settings['bias']!r} is not supported, only 'none'")
    if settings.get("init_lora_weights", True) not in INITIAL:
        how = settings["init_lora_weights"]
        raise UserError(
            f"{where} init_lora_weights {how!r} changes the weights beneath: let peft save it as plain LoRA first"
        )
    for name, value in settings.items():
        if value and name not in UNDERSTOOD | NOT_NUMBERS | {"bias"}:
            raise UserError(f"{where} {name} = {value!r} is not supported, only plain LoRA is")
    for name, kind in (
        ("r", int),
        ("lora_alpha", (int, float)),
        ("rank_pattern", dict),
        ("alpha_pattern", dict),
    ):
        value = settings.get(name)
        if (value is None and kind is not dict) or (
            value is not None and (not isinstance(value, kind) or isinstance(value, bool))
        ):
            raise UserError(f"{where} {name} = {value!r} cannot be")


def _scale(folder: Path, settings: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank, each by its pattern where one names the module, as peft finds it."""
    wanted = _by_pattern(folder, settings.get("rank_pattern"), name, settings["r"])
    if wanted != rank:
        raise UserError(f"{folder}: A of {name} has {rank} rows, but {CONFIG} says r = {wanted}")
    alpha = _by_pattern(folder, settings.get("alpha_pattern"), name, settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(folder: Path, patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    return next(
        (value for key, value in (patterns or {}).items() if _match(folder, rf"(.*\.)?({key})", name)),
        default,
    )


def _match(folder: Path, pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{folder / CONFIG}: {pattern!r} is no regular expression ({error})") from None


def _targeted(adapter: Adapter, name: str) -> bool:
    """Whether adapter_config.json says that a module has an adapter."""

    def among(key: str) -> bool:
        words = adapter.settings.get(key)
        if isinstance(words, str):
            return words == adapters.ALL or _match(adapter.where, words, name)
        return any(name == word or name.endswith(f".{word}") for word in words or ())

    layers = adapter.settings.get("layers_to_transform")
    layer = next(int(word) for word in name.split(".") if word.isdigit())
    here = layers is None or layer in ([layers] if isinstance(layers, int) else layers)
    return here and among("target_modules") and not among("exclude_modules")
