"""Rotary embedding entries of config.json: reads every spelling in use, and refuses contradictory or
incomplete ones."""

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
}
"""Name of an entry -> the setting it holds."""
ORIGINAL_LENGTH = "original_max_position_embeddings"
"""Entry that transformers write for some types; it changes nothing where it is max_position_embeddings."""
TOP_LEVEL = ("rope_theta", "scaling_factor", "partial_rotary_factor")
"""Entries that may also be at the top level of config.json."""
KINDS = ("default", "linear", "dynamic")


def read_rope(config_json: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the rope fields of `ModelConfig`. `default`: the family's values for absent entries (its factor,
    for its own type only).

    Raises `UserError` for unknown, ill-typed, contradictory or incomplete entries.
    """
    entries: dict[str, dict[str, Any]] = {"kind": {}, "base": {}, "factor": {}, "part": {}}
    unknown = {}
    for path, name, value in _entries(config_json):
        if name in SETTINGS:
            entries[SETTINGS[name]][path] = value
        elif name == ORIGINAL_LENGTH and value == config_json.get("max_position_embeddings"):
            continue  # a repetition of the trained length
        elif value != 1:
            unknown[path] = value
    kind = _agreed(entries["kind"], default.get("type", "default"))
    if kind not in KINDS:
        raise UserError(f"config.json: rope scaling {kind!r} is not supported, only {', '.join(KINDS)}")
    if unknown:
        raise UserError(
            f"config.json: rope setting {_listed(unknown)} is not supported, only {', '.join(SETTINGS)}"
        )
    for path, value in (entries["base"] | entries["factor"] | entries["part"]).items():
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
    }


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
                "type linear or dynamic"
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
    # Every version of transformers reads `type`; versions before 4.43, and InternLM2's own code, refuse a
    # third entry (`rope_type`).
    return {
        "rope_theta": config.rotary_base,
        "rope_scaling": None if kind == "none" else {"type": kind, "factor": factor},
    }
