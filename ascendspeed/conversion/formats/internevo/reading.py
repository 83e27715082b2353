"""Reads a training folder of InternEvo."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import rank_files
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, read_config
from ascendspeed.conversion.formats.internevo import config as model_config
from ascendspeed.conversion.formats.internevo import folder as folders
from ascendspeed.conversion.formats.internevo.folder import KIND, TENSOR, InternEvoFolder
from ascendspeed.conversion.formats.internevo.tensors import stored
from ascendspeed.conversion.rank_files import NamingScheme, RankLayout
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.internevo_names import IGNORED_TENSORS, InternEvoOptions, InternEvoStyle
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


def is_one(folder: Path) -> bool:
    """Whether a folder has files of ranks by InternEvo's names."""
    return folders.layout_of(folder) is not None


def dialect(style: InternEvoStyle) -> NamingScheme:
    """InternEvo's names and cuts as rank files know them."""
    rows = tuple(style.rows())
    return NamingScheme(
        style.model_type,
        lambda config: rows,
        IGNORED_TENSORS,
        lambda config, p, grid, rank: stored(style, config, p, rank),
    )


def open_folder(
    folder: Path, config: Path | None = None, asked: InternEvoOptions | None = None
) -> CheckpointReader:
    """`config`: the folder that has config.json (used before model_config.pt) and the tokenizer; None: the same one.

    Raises `UserError` naming what is missing, left over, mis-shaped, damaged or not said; no tensor has been read by then.
    """
    home, asked = config or folder, asked or InternEvoOptions()
    layout, parts, outer = folders.layout_of(folder) or (TENSOR, 0, 0)
    found = folders.read(folder, layout)
    files = 1 + max(t for t, _ in found)
    opened = InternEvoFolder(
        folder, found, model_config.read(folder), layout is not TENSOR, parts or files, outer or files
    )
    style, layers = opened.style(asked), opened.layers
    theirs, model = _architecture(opened, style, home, asked)
    kind = f"{KIND} for {'WP' if style.isp else 'TP'} {style.ranks} x PP {len(layers)}, names of {style.model_type}"
    source = rank_files.source(
        kind, folder, model, theirs, found, dialect(style), RankLayout(style.ranks, layers, 0)
    )
    _note_unfinished(folder)
    return replace(source, beside=home)


def _note_unfinished(folder: Path) -> None:
    """A save ends with a file named by its step. All weights are there by now, but a save that was cut short may mix two steps."""
    trained = (folder / "context.pt").exists() or any(folder.glob("optimizer_*.pt"))
    if trained and not any(folder.glob("*.step")):
        logger.info(
            f"note: {folder} has no STEP.step, which InternEvo writes last: its save may have been cut short"
        )


def _architecture(
    opened: InternEvoFolder, style: InternEvoStyle, home: Path, asked: InternEvoOptions
) -> tuple[dict[str, Any], ModelConfig]:
    """By config.json where there is one, else by model_config.pt and the tensors; what is said twice must agree."""
    there = (home / "config.json").is_file()
    theirs, model = read_config(home) if there else ({}, _told_by_tensors(opened, style, asked))
    if style.model_type not in FAMILIES[model.family].internevo_types:
        raise UserError(
            f"{opened.folder} has the names of {style.model_type}, which is no {model.family} model"
        )
    if model.num_layers != sum(opened.layers):
        raise UserError(
            f"{opened.folder} has {sum(opened.layers)} layers, but {home / 'config.json'} says {model.num_layers}"
        )
    model_config.check(opened.folder, opened.said, model, "config.json" if there else "the tensors")
    may_be_fused = "INTERNLM2" in FAMILIES[model.family].internevo_types and style.model_type == "LLAMA2"
    if may_be_fused and opened.fused(asked) is None:
        logger.info(
            f"note: {opened.folder} does not say enable_qkv_fusion: wq, wk and wv are taken as trained apart; say --qkv-fused yes "
            "if a release of 2024 saved a fused wqkv so"
        )
    if asked.max_pos is not None:
        model = replace(model, max_position_embeddings=asked.max_pos)
    if asked.rotary_type is not None:
        kind, factor = ("none", 1.0) if asked.rotary_type == "origin" else ("dynamic", asked.scaling_factor)
        model = replace(model, rope_scaling_type=kind, rope_scaling_factor=factor)
    return theirs, model


def _family_trained_as(model_type: str | None) -> str | None:
    """Name of the family that a `model_type` of InternEvo means; None: the names of the tensors decide."""
    return next((name for name, family in FAMILIES.items() if model_type in family.internevo_aliases), None)


def _told_by_tensors(opened: InternEvoFolder, style: InternEvoStyle, asked: InternEvoOptions) -> ModelConfig:
    """The architecture by model_config.pt, and by the tensors where it does not say or only roughly (`mlp_ratio`)."""
    said, parts = opened.said, opened.ranks
    heads, longest = said.get("num_attention_heads"), asked.max_pos or said.get("max_position_embeddings")
    lacking = ["the number of heads (model_config.pt)"] * (not heads) + [
        "the longest trained sequence (--max_pos N)"
    ] * (not longest)
    if lacking:
        raise UserError(
            f"{opened.folder} does not say {' nor '.join(lacking)}; or copy the Hugging Face model's config.json there"
        )
    hidden = opened.shape(style.named("input_layernorm.weight")[0])[0]
    groups, width = said.get("num_kv_attention_heads") or heads, said.get("head_dim") or hidden // heads
    rows = parts * sum(opened.shape(name)[0] for name in style.named("linear_qkv.weight"))
    if rows != (heads + 2 * groups) * width:
        said_there = f"{heads} heads, {groups} key/value heads of width {width}"
        raise UserError(
            f"{opened.folder}: model_config.pt says {said_there}, but q, k and v have {rows} rows together"
        )
    return ModelConfig(
        asked.family or _family_trained_as(model_config.trained_as(opened.folder)) or style.family,
        num_layers=sum(opened.layers),
        hidden_size=hidden,
        ffn_hidden_size=parts * opened.shape(style.named("linear_fc1.weight")[0])[0],
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        vocab_size=opened.outer * opened.shape(style.named("output_layer.weight")[0])[0],
        max_position_embeddings=longest,
        norm_epsilon=float(
            said.get("layer_norm_epsilon") or 1e-5
        ),  # InternEvo's own defaults, here and below
        rotary_base=float(said.get("rope_base") or 10000),
        rope_scaling_type="dynamic" if said.get("use_dynamic_ntk_rope") else "none",
        add_qkv_bias=style.named("linear_qkv.bias")[0] in opened.names,
        add_dense_bias=style.named("linear_proj.bias")[0] in opened.names,
    )
