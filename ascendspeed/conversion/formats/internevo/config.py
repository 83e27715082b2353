"""Reads and writes `model_config.pt` of an InternEvo training folder: the `model` table of its training
configuration.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.load_files import load_pt
from ascendspeed.conversion.output_files import save_pt
from ascendspeed.models.families.internevo_names import InternEvoStyle
from ascendspeed.utils.errors import UserError

NAME = "model_config.pt"
TRAINING_CONFIG = "config_file.pt"
"""The text of the whole training configuration."""
TABLES = {"internlm.core.context.parallel_context.Config": dict}
"""Class of InternEvo's tables, a dict with attributes -> the class that is unpickled instead; no code of
InternEvo runs.
"""
REQUIRED_VALUES = {
    "apply_post_layer_norm": False,
    "deepnorm": False,
    "is_reward": False,
    "norm_head": False,
    "norm_type": "rmsnorm",
    "num_experts": 1,
    "use_swiglu": True,
}
"""Supported values, which are InternEvo's own defaults; a model with others cannot be expressed."""
CONFIG_FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_attention_heads": "kv_heads",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_epsilon",
    "rope_base": "rotary_base",
}
"""Entry of model_config.pt -> field of `ModelConfig`."""


def read(folder: Path) -> dict[str, Any]:
    """Reads the table; empty if there is none. Raises `UserError` if it holds more than plain values, or
    unsupported ones.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    table = load_pt(path, known=TABLES)
    if not isinstance(table, dict):
        raise UserError(f"{path} holds a {type(table).__name__}, not a table")
    for name, value in table.items():
        if isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a tensor, not a plain value")
    for name, value in REQUIRED_VALUES.items():
        if table.get(name, value) not in (value, None):
            raise UserError(f"{path}: {name} = {table[name]!r} is not supported, only {value!r}")
    return table


def trained_model_type(folder: Path) -> str:
    """`model_type` in the text of the training configuration, which InternEvo saves too; empty if unknown."""
    path = folder / TRAINING_CONFIG
    text = load_pt(path, known=TABLES) if path.is_file() else ""
    if not isinstance(text, str):
        return ""
    match = re.search(r"^\s*model_type\s*=\s*[\"'](\w+)[\"']", text, re.MULTILINE)
    return match[1] if match else ""


def check(folder: Path, table: Mapping[str, Any], config: ModelConfig, origin: str) -> None:
    """Raises `UserError` if the table contradicts an architecture that is known from `origin`, naming both
    values.
    """
    expected = {name: getattr(config, field) for name, field in CONFIG_FIELDS.items()}
    wrong = [
        f"{name} = {table[name]!r}, {origin} {expected[name]!r}"
        for name in CONFIG_FIELDS
        if table.get(name) not in (None, expected[name])
    ]
    if wrong:
        raise UserError(f"{folder / NAME} says {'; '.join(wrong)}: correct the one that is wrong")


def interleaved(folder: Path, table: Mapping[str, Any], model_type: str) -> bool | None:
    """True if the rows of q and k are stored in rotated pairs; None: the table does not say."""
    new = table.get("qk_interleaved")
    old = table.get("adapt_hf") if model_type != "INTERNLM" else None
    if new is not None and old is not None and bool(new) == bool(old):
        raise UserError(
            f"{folder / NAME} says qk_interleaved = {new!r} and adapt_hf = {old!r}, which is its opposite"
        )
    if new is not None:
        return bool(new)
    return not old if old is not None else None


def write(folder: Path, config: ModelConfig, style: InternEvoStyle, use_flash: bool, dtype: str) -> None:
    """Writes the table in plain values, which any program can open."""
    table = {name: getattr(config, field) for name, field in CONFIG_FIELDS.items()}
    table |= {
        "embed_split_hidden": style.embed_split,
        "norm_type": "rmsnorm",
        "norm_head": False,
        "no_bias": not config.add_qkv_bias,
        "dtype": f"torch.{dtype}",
        "adapt_hf": not style.qk_interleaved,
        "qk_interleaved": style.qk_interleaved,
        "enable_qkv_fusion": style.model_type != "LLAMA2",
        "mlp_layer_fusion": False,
        "use_flash_attn": use_flash,
        "max_position_embeddings": config.max_position_embeddings,
        "use_dynamic_ntk_rope": config.rope_scaling_type == "dynamic",
        "num_chunks": 1,
        **_ffn(config),
    }
    if config.kv_channels is not None:
        table["head_dim"] = config.kv_channels
    save_pt(table, folder / NAME)


def _ffn(config: ModelConfig) -> dict[str, Any]:
    """`mlp_ratio` and `multiple_of`, from which InternEvo computes the MLP's width: it truncates, then rounds
    up.
    """
    width = config.ffn_hidden_size
    hidden = config.hidden_size
    multiple = next(n for n in (256, 128, 64, 32, 16, 8, 4, 2, 1) if width % n == 0)
    ratio = width / hidden
    if -(-int(hidden * ratio) // multiple) * multiple != width:
        ratio = (width + 0.5) / hidden  # keeps the product from falling just below the width
    return {"mlp_ratio": ratio, "multiple_of": multiple}
