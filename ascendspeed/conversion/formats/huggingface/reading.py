"""Reads Hugging Face directories: safetensors or .bin, one file or shards with an index."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.checkpoint_reader import (
    CheckpointReader,
    check_tensor,
    common_dtype,
    from_factory,
    from_stored,
    read_config,
    same_bits,
)
from ascendspeed.conversion.config_check import config_mismatches
from ascendspeed.conversion.formats.huggingface import WEIGHT_FILES
from ascendspeed.conversion.formats.huggingface.int8_layouts import Int8Layout, ModelSlim
from ascendspeed.conversion.formats.huggingface.int8_reading import (
    KEYS,
    Int8Tensors,
    find_layout,
    read_modelslim,
)
from ascendspeed.conversion.load_files import load_pt, load_safetensors, read_index, read_json_object
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.name_check import check_names
from ascendspeed.utils.text import shorten_list

logger = logging.getLogger(__name__)

DESCRIPTION = "Hugging Face directory"
OTHER_WEIGHTS = re.compile(
    r"adapter_model\.(safetensors|bin)|consolidated.*\.(safetensors|pth|pt)|tf_model\.h5|flax_model\.msgpack|.*\.gguf"
)
"""Files of peft, of the models' original programs, and of other frameworks, beside Hugging Face's."""
INDEX = ".index.json"
LOADERS: dict[str, Callable[[Path], Any]] = dict(zip(WEIGHT_FILES, (load_safetensors, load_pt), strict=True))


def open_directory(folder: Path, config_dir: Path) -> CheckpointReader:
    """Opens a directory. Raises `UserError` naming tensors that are missing, superfluous, mis-shaped or
    damaged; reads none.
    """
    config_json, config = read_config(config_dir)
    layout = find_layout(folder, config_json)
    if layout is not None:
        return _open_int8(folder, config_dir, layout, config_json, config)
    tensors = _without_tied_copy(read_tensors(folder), config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    mismatches = config_mismatches(config, shapes, config_json)
    if mismatches:
        raise UserError(f"{folder}: {'; '.join(mismatches)}")
    entries = {
        parameter.name: param_mapping.stored_tensors(config, parameter)
        for parameter in param_mapping.parameters(config)
    }
    expected = {entry.name: entry.shape for stored in entries.values() for entry in stored}
    check_names(folder, expected, tensors, FAMILIES[config.family].ignored_tensors)
    for name, shape in expected.items():
        check_tensor(folder, name, tensors[name], shape)
    dtypes = {}
    matrices = {}
    for name, stored in entries.items():
        dtypes[name] = common_dtype(folder, {entry.name: tensors[entry.name] for entry in stored})
        matrices[name] = [(param_mapping.as_matrix(tensors[entry.name]), entry.slices) for entry in stored]
    return CheckpointReader(
        DESCRIPTION, folder, config, config_json, dtypes, from_stored(matrices), config_dir
    )


def _open_int8(
    folder: Path, config_dir: Path, layout: Int8Layout, config_json: dict[str, Any], config: ModelConfig
) -> CheckpointReader:
    """Opens a directory with int8 matrices, which are read as fp32: exactly number x scale."""
    stored = read_modelslim(folder) if isinstance(layout, ModelSlim) else read_tensors(folder)
    int8_tensors = Int8Tensors(folder, layout, stored)
    entries = {
        parameter.name: param_mapping.stored_tensors(config, parameter)
        for parameter in param_mapping.parameters(config)
    }
    expected = {entry.name: entry.shape for entries_of in entries.values() for entry in entries_of}
    tensors = int8_tensors.check(expected)
    check_names(folder, expected, tensors, FAMILIES[config.family].ignored_tensors)
    for name, shape in expected.items():
        check_tensor(folder, name, tensors[name], shape)
    parameters = {parameter.name: parameter for parameter in param_mapping.parameters(config)}

    def make(name: str) -> Tensor:
        matrices = [
            (param_mapping.as_matrix(int8_tensors.matrix(entry.name, entry.shape)), entry.slices)
            for entry in entries[name]
        ]
        return param_mapping.assemble(matrices, parameters[name].full_slice)

    dtypes = {
        name: common_dtype(folder, {entry.name: tensors[entry.name] for entry in entries_of})
        for name, entries_of in entries.items()
    }
    plain = {key: value for key, value in config_json.items() if key not in KEYS}
    return CheckpointReader(
        f"{DESCRIPTION} with int8 weights", folder, config, plain, dtypes, from_factory(make), config_dir
    )


def _without_tied_copy(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Drops the output layer of a tied model, which some programs save too.

    A copy with other bits than the embedding stays, and is refused later as superfluous.
    """
    names = {row.megatron_param: row.hf_params[0] for row in FAMILIES[config.family].param_mappings}
    head = tensors.get(names["output_layer.weight"])
    embedding = tensors.get(names["embedding.word_embeddings.weight"])
    if (
        config.tie_embeddings
        and isinstance(head, Tensor)
        and isinstance(embedding, Tensor)
        and same_bits(head, embedding)
    ):
        return {name: tensor for name, tensor in tensors.items() if tensor is not head}
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads every tensor of the folder's weight files, memory-mapped, as the index lists them.

    Raises `UserError` if the folder holds the weights twice: which of them are meant is unknown.
    """
    sets = _weight_sets(folder) or [name for name in map(_index_of, LOADERS) if (folder / name).exists()]
    if not sets:
        raise UserError(f"{folder} has no weights: none of {', '.join(LOADERS)}, nor an index of shards")
    if len(sets) > 1:
        raise UserError(
            f"{folder} has several sets of weights: {' and '.join(sets)}; keep those that are meant and "
            f"remove the others, or move them to another folder"
        )
    others = sorted(entry.name for entry in folder.iterdir() if OTHER_WEIGHTS.fullmatch(entry.name))
    if others:
        logger.info(f"note: {folder}: {shorten_list(others)} may hold weights too, which are not read")
    name = sets[0].removesuffix(INDEX)
    if name not in LOADERS:
        raise UserError(f"{folder} has {name}: its index is missing, or names other files")
    if sets[0] == _index_of(name):
        return _read_shards(folder, folder / sets[0], LOADERS[name])
    return _check_table(folder / name, LOADERS[name](folder / name))


def _index_of(single: str) -> str:
    return f"{single}{INDEX}"


def _weight_sets(folder: Path) -> list[str]:
    """Sets of weights in the folder, each as a single file, an index, or shards that no index names.

    An index without any of its shards (left by a download of the other kind) is none.
    """
    names = {entry.name for entry in folder.iterdir()}
    sets = []
    for single in LOADERS:
        stem, suffix = single.split(".")
        shards = {name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)}
        listed = _listed_files(folder / _index_of(single), shards) if _index_of(single) in names else set()
        if single in names - listed:
            sets.append(single)
        if listed & names:
            sets.append(_index_of(single))
        if shards - listed:
            sets.append(f"{shorten_list(sorted(shards - listed), 2)}, which no index names")
    return sets


def _listed_files(index: Path, shards: set[str]) -> set[str]:
    """Files that an index names, present or not. `shards`: the result for a damaged index, which is reported
    on reading it.
    """
    weight_map = read_json_object(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    return set(files) if files and all(isinstance(file, str) for file in files) else shards


def _read_shards(folder: Path, index: Path, load: Callable[[Path], Any]) -> dict[str, Tensor]:
    file_of = read_index(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        shard = _check_table(folder / file, load(folder / file))
        expected = (name for name in file_of if file_of[name] == file)
        check_names(folder / file, expected, shard, of=f"what {index.name} says")
        tensors |= shard
    return tensors


def _check_table(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a table of tensors")
    return content
