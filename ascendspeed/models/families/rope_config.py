"""The rotary embedding in a config.json: every spelling in use is read; what contradicts itself or says only half is refused."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.utils.errors import UserError

TABLES = ("rotary", "rope_scaling", "rope_parameters")
"""InternLM v1's, that of transformers before 5 (beside `rope_theta`), and that of transformers 5."""
WORDS = {
    "rope_type": "kind",
    "type": "kind",
    "rope_theta": "base",
    "base": "base",
    "factor": "factor",
    "scaling_factor": "factor",
    "partial_rotary_factor": "part",
}
"""What an entry of a table speaks of."""
OUTSIDE = ("rope_theta", "scaling_factor", "partial_rotary_factor")
"""Those that may also stand in config.json itself."""
KINDS = ("default", "linear", "dynamic")


def read_rope(theirs: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig`. `default`: what the family means where nothing is said (its factor, for its own type only).

    Raises `UserError` for what is unknown, of the wrong kind, contradictory or incomplete.
    """
    said: dict[str, dict[str, Any]] = {"kind": {}, "base": {}, "factor": {}, "part": {}}
    strange = {}
    for where, word, value in _entries(theirs):
        if word in WORDS:
            said[WORDS[word]][where] = value
        elif value != 1:
            strange[where] = value
    kind = _one(said["kind"], default.get("type", "default"))
    if kind not in KINDS:
        raise UserError(f"config.json: rope scaling {kind!r} is not supported, only {', '.join(KINDS)}")
    if strange:
        raise UserError(
            f"config.json: rope setting {_named(strange)} is not supported, only {', '.join(WORDS)}"
        )
    for where, value in (said["base"] | said["factor"] | said["part"]).items():
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise UserError(f"config.json: {where} = {value!r} is not a positive number")
    base = _one(said["base"], default.get("base", 10000.0))
    if _one(said["part"], 1) != 1:
        raise UserError(
            f"config.json: {_named(said['part'])}: heads that are rotated in part are not supported, only 1"
        )
    factor = _factor(kind, said["factor"], default)
    return {
        "rotary_base": float(base),
        "rope_scaling_type": "none" if kind == "default" else kind,
        "rope_scaling_factor": factor,
    }


def _entries(theirs: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, word, value) of all that is said; null says nothing."""
    yield from ((word, word, theirs[word]) for word in OUTSIDE if theirs.get(word) is not None)
    for name in TABLES:
        table = theirs.get(name)
        if not isinstance(table, Mapping | None):
            raise UserError(f"config.json: {name} = {table!r} is not a table")
        yield from (
            (f"{name}.{word}", word, value) for word, value in (table or {}).items() if value is not None
        )


def _one(said: Mapping[str, Any], default: Any) -> Any:
    """The value that every place agrees on."""
    values = [
        "default" if value == "origin" else value for value in said.values()
    ]  # InternLM's word for no scaling
    if any(value != values[0] for value in values):
        raise UserError(f"config.json: {_named(said)} contradict each other")
    return values[0] if values else default


def _factor(kind: str, said: Mapping[str, Any], default: Mapping[str, Any]) -> float:
    factor = _one(said, default.get("factor") if kind == default.get("type") else None)
    if kind == "default":
        if factor not in (None, 1):
            raise UserError(
                f"config.json: {_named(said)}, but no rope scaling that it belongs to: type linear or dynamic"
            )
        return 1.0
    if factor is None:
        raise UserError(f"config.json: rope scaling {kind!r} lacks its factor")
    if factor < 1:
        raise UserError(f"config.json: {_named(said)} is less than 1")
    return float(factor)


def _named(said: Mapping[str, Any]) -> str:
    return " and ".join(f"{where} = {value!r}" for where, value in said.items())


def write_rope(config: ModelConfig, spelling: str) -> dict[str, Any]:
    """The rope entries of config.json in the family's own spelling."""
    kind, factor = config.rope_scaling_type, config.rope_scaling_factor
    if spelling == "rotary":
        rotary: dict[str, Any] = {"base": config.rotary_base, "type": "origin" if kind == "none" else kind}
        return {"rotary": rotary | ({} if factor == 1.0 else {"scaling_factor": factor})}
    # `type` alone is read by every transformers; those before 4.43, and InternLM2's own code, refuse a third entry (`rope_type`).
    return {
        "rope_theta": config.rotary_base,
        "rope_scaling": None if kind == "none" else {"type": kind, "factor": factor},
    }
