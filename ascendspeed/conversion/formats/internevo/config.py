"""`model_config.pt` of an InternEvo training folder: the `model` table of its training configuration <-> our architecture."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.load_files import load_pt
from ascendspeed.models.families.internevo_names import InternEvoStyle
from ascendspeed.utils.errors import UserError

NAME, WHOLE = "model_config.pt", "config_file.pt"
TABLES = {"internlm.core.context.parallel_context.Config": dict}
"""The class of InternEvo's tables, a dict with attributes, is read as the dict that it is; no code of InternEvo runs."""
ONLY = {
    "apply_post_layer_norm": False,
    "deepnorm": False,
    "is_reward": False,
    "norm_head": False,
    "norm_type": "rmsnorm",
    "num_experts": 1,
    "use_swiglu": True,
}
"""What cannot be expressed otherwise; InternEvo's own defaults."""
SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_attention_heads": "kv_heads",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_epsilon",
    "rope_base": "rotary_base",
}
"""Entry of model_config.pt -> what it is of a `ModelConfig`."""


def read(folder: Path) -> dict[str, Any]:
    """The table, empty when there is none. Raises `UserError` when it holds more than plain values, or what cannot be expressed."""
    path = folder / NAME
    if not path.is_file():
        return {}
    said = load_pt(path, known=TABLES)
    if not isinstance(said, dict):
        raise UserError(f"{path} holds a {type(said).__name__}, not a table")
    for name, value in ONLY.items():
        if said.get(name, value) not in (value, None):
            raise UserError(f"{path}: {name} = {said[name]!r} is not supported, only {value!r}")
    return said


def trained_as(folder: Path) -> str:
    """`model_type` of the training configuration, whose text InternEvo saves too; empty when it is not there or says none."""
    path = folder / WHOLE
    text = load_pt(path, known=TABLES) if path.is_file() else ""
    found = (
        re.search(r"^\s*model_type\s*=\s*[\"'](\w+)[\"']", text, re.MULTILINE)
        if isinstance(text, str)
        else None
    )
    return found[1] if found else ""


def check(folder: Path, said: Mapping[str, Any], config: ModelConfig, by: str) -> None:
    """Raises `UserError` when the table contradicts what is known by other means (`by`), naming both."""
    known = {name: getattr(config, ours) for name, ours in SAME.items()}
    wrong = [
        f"{name} = {said[name]!r}, {by} {known[name]!r}"
        for name in SAME
        if said.get(name) not in (None, known[name])
    ]
    if wrong:
        raise UserError(f"{folder / NAME} says {'; '.join(wrong)}: correct the one that is wrong")


def interleaved(folder: Path, said: Mapping[str, Any], style_of: str) -> bool | None:
    """Whether the rows of q and k lie in pairs; None: the table does not say."""
    new, old = said.get("qk_interleaved"), said.get("adapt_hf") if style_of != "INTERNLM" else None
    if new is not None and old is not None and bool(new) == bool(old):
        raise UserError(
            f"{folder / NAME} says qk_interleaved = {new!r} and adapt_hf = {old!r}, which is its opposite"
        )
    return bool(new) if new is not None else not old if old is not None else None


def write(folder: Path, config: ModelConfig, style: InternEvoStyle, use_flash: bool, dtype: str) -> None:
    """The table in plain values, so that it can be opened by anything."""
    table = {name: getattr(config, ours) for name, ours in SAME.items()}
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
    torch.save(table, folder / NAME)


def _ffn(config: ModelConfig) -> dict[str, Any]:
    """`mlp_ratio` and `multiple_of`, from which InternEvo computes the width of the MLP: it truncates, then rounds up."""
    width, hidden = config.ffn_hidden_size, config.hidden_size
    multiple = next(n for n in (256, 128, 64, 32, 16, 8, 4, 2, 1) if width % n == 0)
    ratio = width / hidden
    if -(-int(hidden * ratio) // multiple) * multiple != width:
        ratio = (width + 0.5) / hidden  # so that the product is not just below the width
    return {"mlp_ratio": ratio, "multiple_of": multiple}
