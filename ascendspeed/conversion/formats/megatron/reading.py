"""Reads rank files under Megatron-core's parameter names and under older ones.

The names in a file are those of `GPTModel.named_parameters()` on that rank: layers count from 0 on every
pipeline stage.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ascendspeed.config.pipeline_stages import check_pipeline_parallel
from ascendspeed.config.schema import ModelConfig, check_tensor_parallel
from ascendspeed.conversion import legacy_names, rank_file_reader, rank_files
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, read_config
from ascendspeed.conversion.formats.megatron import LegacyRankFileFormat
from ascendspeed.conversion.formats.megatron.file_names import MEGATRON, file_names_of
from ascendspeed.conversion.rank_file_names import RankFileNames
from ascendspeed.conversion.rank_files import NamingScheme
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import ParamMapping
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import plain_file_name

logger = logging.getLogger(__name__)


def _megatron_core_names(config: ModelConfig) -> Iterator[ParamMapping]:
    for row in FAMILIES[config.family].param_mappings:
        yield replace(
            row, hf_params=(row.megatron_param,), fusion=row.fusion if row.fusion == "glu" else "one"
        )


MEGATRON_CORE = NamingScheme("Megatron-core", _megatron_core_names, ignored=(r".*\._extra_state",))
NAMING_SCHEMES = (MEGATRON_CORE, *legacy_names.ALL)
"""Parameter names that rank files may have; the first are those that are written."""


def open_rank_files(folder: Path, config_dir: Path) -> CheckpointReader:
    """Opens the folder of a tracker file, or of one iteration.

    Raises `UserError` naming tensors that are missing, superfluous, mis-shaped or damaged; reads none.
    """
    file_names = file_names_of(folder)
    iteration = _iteration(folder, file_names)
    if iteration == folder == config_dir and not (config_dir / "config.json").is_file():
        config_dir = folder.parent  # the folder of one iteration was named
    config_json, config = read_config(config_dir)
    _check_not_sharded(iteration)
    tensors = rank_files.read(iteration, file_names)
    scheme = rank_files.detect_naming(iteration, NAMING_SCHEMES, config, tensors)
    rank_files.check_layers(iteration, scheme, config, tensors)
    layout = rank_files.layout_of(iteration, file_names, tensors, config)
    check_tensor_parallel(config, layout.tp)
    check_pipeline_parallel(config, layout.pp)
    if scheme in legacy_names.BEFORE_MEGATRON_CORE:
        LegacyRankFileFormat().check_family(config.family, "read")
    if warning := legacy_names.query_order_warning(scheme, config, layout.tp):
        logger.info(f"note: {folder}: {warning}")
    description = f"{file_names.description} for TP {layout.tp} x PP {layout.pp}"
    if scheme is not MEGATRON_CORE:
        description += f", names of {scheme.name}"
    reader = rank_file_reader.open_reader(description, folder, config, config_json, tensors, scheme, layout)
    return replace(reader, assets_dir=config_dir, parallel_sizes=(layout.tp, layout.pp))


def _check_not_sharded(iteration: Path) -> None:
    """Raises `UserError` for a checkpoint in Megatron-core's own sharded format, whose index is a pickle."""
    if (iteration / ".metadata").exists() or any(iteration.glob("*.distcp")):
        raise UserError(
            f"{iteration} is in Megatron's torch_dist format, which is not read here: let Megatron-LM write "
            f"rank files first "
            "(--ckpt-convert-format torch --ckpt-convert-save DIR)"
        )


def _iteration(folder: Path, file_names: RankFileNames) -> Path:
    tracker = folder / file_names.tracker
    if not tracker.exists():
        return folder
    try:
        name = tracker.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{tracker} cannot be read: {error}") from error
    if file_names is MEGATRON and name.isascii() and name.isdigit():
        name = f"iter_{int(name):07d}"
    return folder / plain_file_name(name, tracker)
