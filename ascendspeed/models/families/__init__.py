"""Registry of model families, one declarative entry each. To add a family, write its entry and add it to
`FAMILIES`."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.families.baichuan import BAICHUAN
from ascendspeed.models.families.base import Family, ParamMapping
from ascendspeed.models.families.gemma import GEMMA
from ascendspeed.models.families.internlm import INTERNLM
from ascendspeed.models.families.internlm2 import INTERNLM2
from ascendspeed.models.families.internlm3 import INTERNLM3
from ascendspeed.models.families.llama import LLAMA
from ascendspeed.models.families.mixtral import MIXTRAL
from ascendspeed.models.families.qwen2 import QWEN2
from ascendspeed.models.families.qwen2_moe import QWEN2_MOE
from ascendspeed.models.families.qwen3 import QWEN3
from ascendspeed.models.families.qwen3_moe import QWEN3_MOE
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        INTERNLM,
        INTERNLM2,
        INTERNLM3,
        LLAMA,
        QWEN2,
        QWEN3,
        BAICHUAN,
        GEMMA,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}
PRESETS: dict[str, ModelConfig] = {
    name: config for family in FAMILIES.values() for name, config in family.presets.items()
}

REFERENCE = LLAMA
"""Family whose names and class in transformers other families can be converted to."""


def chat_template_beside(folder: Path) -> str | None:
    """Chat template of the family that a config.json in `folder` names; None: no config.json, or no template
    of its own."""
    path = folder / "config.json"
    model_type = read_json_object(path).get("model_type") if path.is_file() else None
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return family.chat_template if family else None


def preset(name: str) -> ModelConfig:
    """Returns the architecture of `--model NAME`. Raises `UserError` with all names and a near one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown model {name!r}{hint}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


def family_of(config_json: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json by its `model_type`. Raises `UserError` for an unknown one."""
    name = config_json.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"config.json: model_type {name!r} is not supported; there are: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def read_config(path: Path) -> ModelConfig:
    """Returns the architecture in a config.json. Raises `UserError`, with the folder, for an unreadable file
    or an unknown family."""
    config_json = read_json_object(path)
    try:
        return family_of(config_json).read_config(config_json)
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from None


__all__ = [
    "FAMILIES",
    "PRESETS",
    "REFERENCE",
    "Family",
    "ParamMapping",
    "chat_template_beside",
    "family_of",
    "preset",
    "read_config",
]
