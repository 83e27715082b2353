"""Opens the tensors of rank files as one model, and checks that the ranks are consistent with each other."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.checkpoint_reader import (
    CheckpointReader,
    check_tensor,
    common_dtype,
    from_stored,
    same_bits,
)
from ascendspeed.conversion.rank_files import (
    NamingScheme,
    RankLayout,
    RankTensors,
    StoredMatrices,
    stored_tensors,
)
from ascendspeed.models import param_mapping
from ascendspeed.models.param_mapping import Parameter, Slice2D, StoredTensor
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names

logger = logging.getLogger(__name__)

PADDING_MULTIPLE = 128
"""By default the vocabulary is padded to a multiple of this, times the tensor-parallel ranks."""
COMPARED_ROWS = 64
"""Rows of a shard by which files are told apart."""


def open_reader(
    description: str,
    folder: Path,
    config: ModelConfig,
    config_json: dict[str, Any],
    tensors: RankTensors,
    scheme: NamingScheme,
    layout: RankLayout,
) -> CheckpointReader:
    """Reads parameters from the tensors of all ranks.

    Raises `UserError` naming tensors that are missing, superfluous, mis-shaped or inconsistent between ranks.
    """
    labelled: dict[str, dict[str, Tensor]] = {}
    matrices: StoredMatrices = {}
    first_copies: dict[tuple[str, tuple[Slice2D, ...]], Tensor] = {}
    for (t, p), rank_tensors in tensors.items():
        entries = list(stored_tensors(config, scheme, layout, t, p))
        path = folder / f"(rank {t}, stage {p})" if len(tensors) > 1 else folder
        check_names(path, (entry.name for entry in entries), rank_tensors, scheme.ignored)
        for entry in entries:
            tensor = rank_tensors[entry.name]
            name = entry.parameter.name
            check_tensor(path, entry.name, tensor, entry.shape)
            labelled.setdefault(name, {})[f"{entry.name} of rank {t}, stage {p}"] = tensor
            first = first_copies.setdefault((name, entry.slices), tensor)
            if first is tensor or not entry.slices:  # without tiles a tensor is all padding, not a copy
                matrices.setdefault(name, []).append((param_mapping.as_matrix(tensor), entry.slices))
            elif not same_bits(tensor, first):
                raise UserError(
                    f"{folder}: {entry.name} of rank {t}, stage {p} is not the copy of another's that it "
                    f"should be"
                )
    _check_distinct_shards(folder, config, scheme, layout, tensors)
    _check_padding(folder, config, layout, matrices)
    dtypes = {p.name: common_dtype(folder, labelled[p.name]) for p in param_mapping.parameters(config)}
    return CheckpointReader(description, folder, config, config_json, dtypes, from_stored(matrices), folder)


def _check_distinct_shards(
    folder: Path, config: ModelConfig, scheme: NamingScheme, layout: RankLayout, tensors: RankTensors
) -> None:
    """Raises `UserError` if two files that should hold different weights hold the same: one was copied over
    the other.
    """
    owners: dict[bytes, tuple[object, str]] = {}
    for (t, p), rank_tensors in tensors.items():
        entry = _first_shard(config, scheme, layout, t, p)
        if entry is None:
            continue  # a stage without layers
        rows = rank_tensors[entry.name][:COMPARED_ROWS]
        if bool((rows == rows[0, 0]).all()):
            continue  # constant weights do not tell ranks apart
        digest = hashlib.sha256(memoryview(rows.contiguous().flatten().view(torch.uint8).numpy())).digest()
        shard = (entry.parameter.name, entry.slices)
        other_shard, owner = owners.setdefault(digest, (shard, f"rank {t}, stage {p}"))
        if other_shard != shard:
            raise UserError(
                f"{folder}: rank {t}, stage {p} holds the weights of {owner}: was one file copied over the "
                f"other?"
            )


def _first_shard(
    config: ModelConfig, scheme: NamingScheme, layout: RankLayout, rank: int, stage: int
) -> StoredTensor | None:
    """The first matrix of a layer that tensor parallel splits."""
    for entry in stored_tensors(config, scheme, layout, rank, stage):
        parameter = entry.parameter
        if (
            parameter.layer is not None
            and len(entry.shape) == 2
            and parameter.mapping.partition != "replicated"
        ):
            return entry
    return None


def _check_padding(folder: Path, config: ModelConfig, layout: RankLayout, matrices: StoredMatrices) -> None:
    """Prints a note on rows beyond the vocabulary that hold values.

    Accepted without a note: zeros, which this project writes, and copies of the last rows, which
    AscendSpeed's converter wrote. Raises `UserError` if there are more such rows than padding explains:
    config.json is then out of date.
    """
    if layout.padded_vocab <= config.vocab_size:
        return
    for parameter in param_mapping.parameters(config):
        if parameter.layer is not None or parameter.mapping.partition != "vocab":
            continue
        stored = matrices[parameter.name]
        padding = [matrix[sum(tile.rows for tile in tiles) :] for matrix, tiles in stored]
        rows = sum(len(part) for part in padding)
        is_zero = not any(bool(part.any()) for part in padding)
        if is_zero or _repeats_last_rows(padding, rows, parameter, stored):
            continue
        if rows >= PADDING_MULTIPLE * layout.tp:
            raise UserError(
                f"{folder}: {parameter.name} has {rows} rows beyond the vocab_size = {config.vocab_size} of "
                f"config.json, and they "
                "hold values that would be lost: correct vocab_size"
            )
        logger.info(
            f"note: {folder}: {rows} rows of padding in {parameter.name} hold values; they are left out"
        )


def _repeats_last_rows(padding: list[Tensor], count: int, parameter: Parameter, stored: list) -> bool:
    rows, columns = parameter.shape
    if count > rows:
        return False
    last_rows = param_mapping.assemble(stored, Slice2D(rows - count, 0, 0, 0, count, columns))
    return same_bits(last_rows, torch.cat(padding))
