"""Hugging Face directories: safetensors or .bin, one file or shards with an index; written as safetensors."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import hf_assets, support_matrix
from ascendspeed.conversion import write as writing
from ascendspeed.conversion.checkpoint_reader import (
    CheckpointReader,
    check_names,
    check_tensor,
    from_pieces,
    one_dtype,
    read_config,
    same_bits,
)
from ascendspeed.conversion.config_check import config_mismatches
from ascendspeed.conversion.load_files import load_pt, load_safetensors, read_index
from ascendspeed.conversion.output_files import create_safetensors, nbytes, write_json
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.utils.errors import UserError

KIND = "Hugging Face directory"
WEIGHTS = {"model.safetensors": load_safetensors, "pytorch_model.bin": load_pt}
"""Name of the single file -> how it is read; in shards it is `model-00001-of-00002.safetensors` and so on, with an index."""


def is_one(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face directory with weights."""
    return any((folder / name).exists() or (folder / f"{name}.index.json").exists() for name in WEIGHTS)


def open_folder(folder: Path, config: Path) -> CheckpointReader:
    """Raises `UserError` naming what is missing, left over, mis-shaped or damaged; no tensor has been read by then."""
    theirs, config, beside = *read_config(config), config
    tensors = _without_tied_copy(tensors_in(folder), config)
    faults = config_mismatches(
        config, {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
    )
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}")
    entries = {
        parameter.name: param_mapping.stored_tensors(config, parameter)
        for parameter in param_mapping.parameters(config)
    }
    expected = {entry.name: entry.shape for held in entries.values() for entry in held}
    check_names(folder, expected, tensors, FAMILIES[config.family].ignored_tensors)
    for name, shape in expected.items():
        check_tensor(folder, name, tensors[name], shape)
    dtypes = {
        ours: one_dtype(folder, {entry.name: tensors[entry.name] for entry in held})
        for ours, held in entries.items()
    }
    pieces = {
        ours: [(param_mapping.as_matrix(tensors[e.name]), e.slices) for e in held]
        for ours, held in entries.items()
    }
    return CheckpointReader(KIND, folder, config, theirs, dtypes, from_pieces(pieces), beside)


def _without_tied_copy(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Some programs save the output layer of a tied model too; one with other bits than the embedding stays, to be refused."""
    names = {row.megatron_param: row.hf_params[0] for row in FAMILIES[config.family].param_mappings}
    head, embedding = (
        tensors.get(names[ours]) for ours in ("output_layer.weight", "embedding.word_embeddings.weight")
    )
    if (
        config.tie_embeddings
        and isinstance(head, Tensor)
        and isinstance(embedding, Tensor)
        and same_bits(head, embedding)
    ):
        return {name: tensor for name, tensor in tensors.items() if tensor is not head}
    return tensors


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weight files, memory-mapped, as the index says."""
    for single, load in WEIGHTS.items():
        alone, index = folder / single, folder / f"{single}.index.json"
        if alone.exists() and index.exists():
            raise UserError(f"{folder} has {single} and {index.name}: remove the one that is not meant")
        if alone.exists():
            return _table(alone, load(alone))
        if index.exists():
            return _shards(folder, index, load)
    raise UserError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}, nor an index of shards")


def _shards(folder: Path, index: Path, load: Any) -> dict[str, Tensor]:
    where = read_index(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        held = _table(folder / file, load(folder / file))
        check_names(
            folder / file, (name for name in where if where[name] == file), held, of=f"what {index.name} says"
        )
        tensors |= held
    return tensors


def _table(path: Path, held: Any) -> dict[str, Tensor]:
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__}, not a table of tensors")
    return held


@dataclass(frozen=True)
class HuggingFaceWriter:
    """How to write a Hugging Face directory."""

    family: str | None = None
    """Under the names of this family (`REFERENCE.name`: for programs that support no other); None: under the source's own."""
    max_shard_size: int = 10 * 10**9
    """Bytes of one file; a larger tensor gets a file of its own."""
    copy_code: bool = False
    """With the source's `*.py`, unexecuted, and with the entries of its JSON files that lead to them."""

    def check(self, source: CheckpointReader) -> None:
        """Raises `UserError` when the source cannot be written so."""
        if self.family == REFERENCE.name:
            support_matrix.check("hf-llama", "writes", source.config.family)
        config = self._config(source)
        FAMILIES[config.family].write_config(config)
        if self.copy_code:
            hf_assets.check_code(source, config)

    def files(self, source: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """What will be written, filled in the model's order."""
        config = self._config(source)
        shards: list[list[param_mapping.StoredTensor]] = [[]]
        room = self.max_shard_size
        for parameter in param_mapping.parameters(config):
            for entry in param_mapping.stored_tensors(config, parameter):
                size = nbytes(dtype or source.dtypes[parameter.name], entry.shape)
                if size > room and shards[-1]:
                    shards.append([])
                    room = self.max_shard_size
                shards[-1].append(entry)
                room -= size
        if len(shards) == 1:
            return [PlannedFile("model.safetensors", tuple(shards[0]), create_safetensors)]
        names = (f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1))
        return [
            PlannedFile(name, tuple(held), create_safetensors)
            for name, held in zip(names, shards, strict=True)
        ]

    def finish(self, source: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes what stands beside the weights: the index, config.json, the tokenizer."""
        files = self.files(source, dtype)
        if len(files) > 1:
            where = {entry.name: file.path for file in files for entry in file.holds}
            total = writing.size(source, files, dtype)
            write_json(
                folder / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": where},
            )
        hf_assets.write(
            source, folder, self._config(source), dtype, for_transformers=True, copy_code=self.copy_code
        )

    def _config(self, source: CheckpointReader) -> ModelConfig:
        return replace(source.config, family=self.family or source.config.family)
