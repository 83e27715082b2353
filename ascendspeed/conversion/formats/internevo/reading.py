"""Reads training folders of InternEvo."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import rank_file_reader
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, read_config
from ascendspeed.conversion.formats.internevo import config as model_config
from ascendspeed.conversion.formats.internevo.file_names import DESCRIPTION
from ascendspeed.conversion.formats.internevo.folder import InternEvoFolder
from ascendspeed.conversion.formats.internevo.tensors import stored_tensors
from ascendspeed.conversion.rank_files import NamingScheme, RankLayout
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.internevo_names import IGNORED_TENSORS, InternEvoOptions, InternEvoStyle
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


def naming_scheme(style: InternEvoStyle) -> NamingScheme:
    """Returns InternEvo's names and shards as a naming scheme of rank files."""
    rows = tuple(style.rows())
    return NamingScheme(
        style.model_type,
        lambda config: rows,
        IGNORED_TENSORS,
        lambda config, parameter, layout, rank: stored_tensors(style, config, parameter, rank),
    )


def open_training_folder(
    folder: Path, config_dir: Path | None = None, options: InternEvoOptions | None = None
) -> CheckpointReader:
    """Opens a folder; `config_dir` has config.json (preferred to model_config.pt) and the tokenizer, by
    default the folder itself.

    Raises `UserError` naming what is missing, superfluous, mis-shaped, damaged or unknown; reads no tensor.
    """
    config_dir = config_dir or folder
    options = options or InternEvoOptions()
    opened = InternEvoFolder.open(folder)
    style = opened.style(options)
    layers = opened.layers
    config_json, config = _architecture(opened, style, config_dir, options)
    parallel_mode = "WP" if style.isp else "TP"
    description = (
        f"{DESCRIPTION} for {parallel_mode} {style.ranks} x PP {len(layers)}, names of {style.model_type}"
    )
    layout = RankLayout(style.ranks, layers, 0)
    reader = rank_file_reader.open_reader(
        description, folder, config, config_json, opened.tensors, naming_scheme(style), layout
    )
    _warn_if_unfinished(folder)
    return replace(reader, assets_dir=config_dir)


def _warn_if_unfinished(folder: Path) -> None:
    """Prints a note if the file that ends a save is missing: all weights are there, but they may mix two
    steps.
    """
    is_training_save = (folder / "context.pt").exists() or any(folder.glob("optimizer_*.pt"))
    if is_training_save and not any(folder.glob("*.step")):
        logger.info(
            f"note: {folder} has no STEP.step, which InternEvo writes last: its save may have been cut short"
        )


def _architecture(
    opened: InternEvoFolder, style: InternEvoStyle, config_dir: Path, options: InternEvoOptions
) -> tuple[dict[str, Any], ModelConfig]:
    """The architecture from config.json, or else from model_config.pt and the tensors; all sources must
    agree.
    """
    has_config = (config_dir / "config.json").is_file()
    config_json, config = (
        read_config(config_dir) if has_config else ({}, _config_from_tensors(opened, style, options))
    )
    internevo_types = FAMILIES[config.family].internevo_types
    if style.model_type not in internevo_types:
        raise UserError(
            f"{opened.folder} has the names of {style.model_type}, which is no {config.family} model"
        )
    if config.num_layers != sum(opened.layers):
        raise UserError(
            f"{opened.folder} has {sum(opened.layers)} layers, but {config_dir / 'config.json'} says "
            f"{config.num_layers}"
        )
    origin = "config.json" if has_config else "the tensors"
    model_config.check(opened.folder, opened.model_config, config, origin)
    may_be_fused = "INTERNLM2" in internevo_types and style.model_type == "LLAMA2"
    if may_be_fused and opened.has_fused_qkv(options) is None:
        logger.info(
            f"note: {opened.folder} does not say enable_qkv_fusion: wq, wk and wv are taken as trained "
            f"apart; say --qkv-fused yes "
            "if a release of 2024 saved a fused wqkv so"
        )
    if options.max_pos is not None:
        config = replace(config, max_position_embeddings=options.max_pos)
    if options.rotary_type == "origin":
        config = replace(config, rope_scaling_type="none", rope_scaling_factor=1.0)
    elif options.rotary_type == "dynamic":
        config = replace(config, rope_scaling_type="dynamic", rope_scaling_factor=options.scaling_factor)
    return config_json, config


def _family_trained_as(model_type: str) -> str | None:
    """Name of the family that a `model_type` of InternEvo means; None: the names of the tensors decide."""
    return next((name for name, family in FAMILIES.items() if model_type in family.internevo_aliases), None)


def _config_from_tensors(
    opened: InternEvoFolder, style: InternEvoStyle, options: InternEvoOptions
) -> ModelConfig:
    """The architecture from model_config.pt, and from the tensors where the file is silent or imprecise
    (`mlp_ratio`).
    """
    table = opened.model_config
    heads = table.get("num_attention_heads")
    max_positions = options.max_pos or table.get("max_position_embeddings")
    unknown = []
    if not heads:
        unknown.append("the number of heads (model_config.pt)")
    if not max_positions:
        unknown.append("the longest trained sequence (--max_pos N)")
    if unknown:
        raise UserError(
            f"{opened.folder} does not say {' nor '.join(unknown)}; or copy the Hugging Face model's "
            f"config.json there"
        )
    hidden = opened.shape(style.named("input_layernorm.weight")[0])[0]
    kv_heads = table.get("num_kv_attention_heads") or heads
    head_dim = table.get("head_dim") or hidden // heads
    qkv_rows = opened.ranks * sum(opened.shape(name)[0] for name in style.named("linear_qkv.weight"))
    if qkv_rows != (heads + 2 * kv_heads) * head_dim:
        raise UserError(
            f"{opened.folder}: model_config.pt says {heads} heads, {kv_heads} key/value heads of width "
            f"{head_dim}, "
            f"but q, k and v have {qkv_rows} rows together"
        )
    trained_as = model_config.trained_model_type(opened.folder)
    family = options.family or _family_trained_as(trained_as) or style.family
    return ModelConfig(
        family,
        num_layers=sum(opened.layers),
        hidden_size=hidden,
        ffn_hidden_size=opened.ranks * opened.shape(style.named("linear_fc1.weight")[0])[0],
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=head_dim,
        vocab_size=opened.vocabulary_ranks * opened.shape(style.named("output_layer.weight")[0])[0],
        max_position_embeddings=max_positions,
        norm_epsilon=float(table.get("layer_norm_epsilon") or 1e-5),  # InternEvo's defaults, here and below
        rotary_base=float(table.get("rope_base") or 10000),
        rope_scaling_type="dynamic" if table.get("use_dynamic_ntk_rope") else "none",
        add_qkv_bias=style.named("linear_qkv.bias")[0] in opened.names,
        add_dense_bias=style.named("linear_proj.bias")[0] in opened.names,
    )
