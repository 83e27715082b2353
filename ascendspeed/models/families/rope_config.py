"""Rotary embedding entries of config.json: reads every spelling in use, and refuses contradictory or
incomplete ones."""

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.utils.errors import UserError

TABLES = ("rotary", "rope_scaling", "rope_parameters")
"""Table of InternLM v1, of transformers before 5 (beside `rope_theta`), and of transformers 5."""
SETTINGS = {
    "rope_type": "kind",
    "type": "kind",
    "rope_theta": "base",
    "base": "base",
    "factor": "factor",
    "scaling_factor": "factor",
    "partial_rotary_factor": "part",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "original",
    "beta_fast": "fast",
    "beta_slow": "slow",
    "attention_factor": "attention",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all",
}
"""Name of an entry -> the setting it holds."""
LLAMA3_FIELDS = {
    "original": "rope_original_max_position_embeddings",
    "low": "rope_low_freq_factor",
    "high": "rope_high_freq_factor",
}
"""Setting that belongs to the type llama3 -> field of `ModelConfig`."""
YARN_FIELDS = {
    "original": "rope_original_max_position_embeddings",
    "fast": "rope_beta_fast",
    "slow": "rope_beta_slow",
    "attention": "rope_attention_factor",
}
"""Setting that belongs to the type yarn -> field of `ModelConfig`."""
FIELDS_OF = {"llama3": LLAMA3_FIELDS, "yarn": YARN_FIELDS}
MSCALES = ("mscale", "mscale_all")
"""Settings of yarn that give its attention factor."""
TOP_LEVEL = ("rope_theta", "scaling_factor", "partial_rotary_factor")
"""Entries that may also be at the top level of config.json."""
KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(config_json: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the rope fields of `ModelConfig`. `default`: the family's values for absent entries (its factor,
    for its own type only).

    Raises `UserError` for unknown, ill-typed, contradictory or incomplete entries.
    """
    entries: dict[str, dict[str, Any]] = {setting: {} for setting in SETTINGS.values()}
    unknown = {}
    for path, name, value in _entries(config_json):
        if name in SETTINGS:
            entries[SETTINGS[name]][path] = value
        elif value != 1:
            unknown[path] = value
    kind = _agreed(entries["kind"], default.get("type", "default"))
    if kind not in KINDS:
        raise UserError(f"config.json: rope scaling {kind!r} is not supported, only {', '.join(KINDS)}")
    if unknown:
        raise UserError(
            f"config.json: rope setting {_listed(unknown)} is not supported, only {', '.join(SETTINGS)}"
        )
    for path, value in [pair for name in entries if name != "kind" for pair in entries[name].items()]:
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise UserError(f"config.json: {path} = {value!r} is not a positive number")
    base = _agreed(entries["base"], default.get("base", 10000.0))
    if _agreed(entries["part"], 1) != 1:
        raise UserError(
            f"config.json: {_listed(entries['part'])}: partially rotated heads are not supported, only 1"
        )
    factor = _factor(kind, entries["factor"], default)
    return {
        "rotary_base": float(base),
        "rope_scaling_type": "none" if kind == "default" else kind,
        "rope_scaling_factor": factor,
        **_fields_of_kind(kind, factor, entries, config_json.get("max_position_embeddings")),
    }


def _fields_of_kind(
    kind: str, factor: float, entries: Mapping[str, Mapping[str, Any]], trained_length: Any
) -> dict[str, float | int | None]:
    """Fields that only the types llama3 and yarn have. Raises `UserError` if one is missing, or belongs to
    another type."""
    _refuse_other_settings(kind, entries, trained_length)
    if kind == "llama3":
        return _llama3_fields(entries)
    if kind == "yarn":
        return _yarn_fields(factor, entries, trained_length)
    return {}


def _refuse_other_settings(kind: str, entries: Mapping[str, Mapping[str, Any]], trained_length: Any) -> None:
    """Raises `UserError` for settings that belong to another type than `kind`."""
    of_kind = FIELDS_OF.get(kind, {})
    others: dict[str, Any] = {}
    kinds: list[str] = []
    for other, fields in FIELDS_OF.items():
        for setting in (*fields, *(MSCALES if other == "yarn" else ())):
            if setting in of_kind or (setting in MSCALES and kind == "yarn"):
                continue
            # transformers write the original length for some types; it changes nothing where it is the
            # trained one.
            is_length = setting == "original"
            found = {p: v for p, v in entries[setting].items() if not is_length or v != trained_length}
            others |= found
            kinds += [other] if found and other not in kinds else []
    if others:
        names = " and ".join(repr(name) for name in kinds)
        raise UserError(
            f"config.json: rope setting {_listed(others)} is supported for rope scaling {names} only"
        )


def _llama3_fields(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float | int | None]:
    missing = [
        name for name, setting in SETTINGS.items() if setting in LLAMA3_FIELDS and not entries[setting]
    ]
    if missing:
        raise UserError(f"config.json: rope scaling 'llama3' lacks {' and '.join(missing)}")
    low, high = (_agreed(entries[setting], None) for setting in ("low", "high"))
    fields = {"low": float(low), "high": float(high), "original": _original(entries, None)}
    return {LLAMA3_FIELDS[setting]: value for setting, value in fields.items()}


def _yarn_fields(
    factor: float, entries: Mapping[str, Mapping[str, Any]], trained_length: Any
) -> dict[str, float | int | None]:
    """Fields of yarn, with transformers' defaults for absent entries."""
    attention = _agreed(entries["attention"], None)
    scales = [_agreed(entries[setting], None) for setting in MSCALES]
    if attention is None and all(scales):
        attention = yarn_attention_factor(factor, scales[0]) / yarn_attention_factor(factor, scales[1])
    fast, slow = float(_agreed(entries["fast"], 32)), float(_agreed(entries["slow"], 1))
    return {
        "rope_original_max_position_embeddings": _original(entries, trained_length),
        "rope_beta_fast": fast,
        "rope_beta_slow": slow,
        "rope_attention_factor": None if attention is None else float(attention),
    }


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """Factor of cos and sin that yarn takes for a scaling factor, with `scale` before its logarithm."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(entries: Mapping[str, Mapping[str, Any]], default: Any) -> int:
    original = _agreed(entries["original"], default)
    if type(original) is not int:
        raise UserError(f"config.json: {_listed(entries['original'])} is not a whole number")
    return original


def check_rope(config: ModelConfig) -> None:
    """Raises `UserError` for settings of the types llama3 and yarn that are missing or contradictory, or that
    another type does not use."""
    default, kind = ModelConfig(), config.rope_scaling_type
    for other, fields in FIELDS_OF.items():
        for name in fields.values():
            used = name in FIELDS_OF.get(kind, {}).values()
            if not used and getattr(config, name) != getattr(default, name):
                raise UserError(
                    f"{name} = {getattr(config, name)} is for rope scaling {other} only, not for {kind}"
                )
    if kind not in FIELDS_OF:
        return
    if config.rope_original_max_position_embeddings is None:
        examples = {"llama3": "8192 in Llama 3.1 and 3.2", "yarn": "32768 in Qwen3"}
        raise UserError(f"rope scaling {kind} needs rope_original_max_position_embeddings ({examples[kind]})")
    if kind == "llama3" and config.rope_low_freq_factor >= config.rope_high_freq_factor:
        raise UserError(
            f"rope_low_freq_factor {config.rope_low_freq_factor} is not below rope_high_freq_factor "
            f"{config.rope_high_freq_factor}"
        )
    if kind == "yarn" and config.rope_beta_slow > config.rope_beta_fast:
        raise UserError(
            f"rope_beta_slow {config.rope_beta_slow} is above rope_beta_fast {config.rope_beta_fast}"
        )
    if kind == "yarn" and config.rotary_base <= 1:
        raise UserError(f"rope scaling yarn needs a rotary_base above 1, not {config.rotary_base}")


def _entries(config_json: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields (path in config.json, name, value) of all rope entries that are not null."""
    for name in TOP_LEVEL:
        if config_json.get(name) is not None:
            yield name, name, config_json[name]
    for table_name in TABLES:
        table = config_json.get(table_name)
        if not isinstance(table, Mapping | None):
            raise UserError(f"config.json: {table_name} = {table!r} is not a table")
        for name, value in (table or {}).items():
            if value is not None:
                yield f"{table_name}.{name}", name, value


def _agreed(entries: Mapping[str, Any], default: Any) -> Any:
    """The value of a setting. Raises `UserError` if its entries differ."""
    # "origin" is InternLM's word for no scaling.
    values = ["default" if value == "origin" else value for value in entries.values()]
    if any(value != values[0] for value in values):
        raise UserError(f"config.json: {_listed(entries)} contradict each other")
    return values[0] if values else default


def _factor(kind: str, entries: Mapping[str, Any], default: Mapping[str, Any]) -> float:
    factor = _agreed(entries, default.get("factor") if kind == default.get("type") else None)
    if kind == "default":
        if factor not in (None, 1):
            raise UserError(
                f"config.json: {_listed(entries)}, but no rope scaling that it belongs to: "
                "type linear, dynamic, llama3 or yarn"
            )
        return 1.0
    if factor is None:
        raise UserError(f"config.json: rope scaling {kind!r} lacks its factor")
    if factor < 1:
        raise UserError(f"config.json: {_listed(entries)} is less than 1")
    return float(factor)


def _listed(entries: Mapping[str, Any]) -> str:
    return " and ".join(f"{path} = {value!r}" for path, value in entries.items())


def write_rope(config: ModelConfig, spelling: str) -> dict[str, Any]:
    """The rope entries of config.json in the family's spelling."""
    kind, factor = config.rope_scaling_type, config.rope_scaling_factor
    if spelling == "rotary":
        rotary: dict[str, Any] = {"base": config.rotary_base, "type": "origin" if kind == "none" else kind}
        return {"rotary": rotary | ({} if factor == 1.0 else {"scaling_factor": factor})}
    if kind == "llama3":  # transformers have it since 4.43, with `rope_type`
        scaling = {"rope_type": kind, "factor": factor}
        names = {setting: name for name, setting in SETTINGS.items()}
        scaling |= {names[setting]: getattr(config, field) for setting, field in LLAMA3_FIELDS.items()}
        return {"rope_theta": config.rotary_base, "rope_scaling": scaling}
    if kind == "yarn":
        return {"rope_theta": config.rotary_base, "rope_scaling": _written_yarn(config)}
    # Every version of transformers reads `type`; versions before 4.43, and InternLM2's own code, refuse a
    # third entry (`rope_type`).
    return {
        "rope_theta": config.rotary_base,
        "rope_scaling": None if kind == "none" else {"type": kind, "factor": factor},
    }


def _written_yarn(config: ModelConfig) -> dict[str, Any]:
    """rope_scaling of the type yarn, without entries that have transformers' default."""
    names, default = {setting: name for name, setting in SETTINGS.items()}, ModelConfig()
    entries = {
        names[setting]: (getattr(config, f), getattr(default, f)) for setting, f in YARN_FIELDS.items()
    }
    given = {name: value for name, (value, usual) in entries.items() if value != usual}
    return {"rope_type": "yarn", "factor": config.rope_scaling_factor, **given}
