"""Hugging Face directories: safetensors or .bin, one file or shards with an index; written as safetensors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed import weights
from ascendspeed.config import ModelConfig
from ascendspeed.errors import UserError
from ascendspeed.families import FAMILIES
from ascendspeed.formats import sidecars, tokenizer_json
from ascendspeed.formats.files import Specs, create_safetensors, load_pt, load_safetensors, nbytes, read_json, write_json
from ascendspeed.formats.progress import Report
from ascendspeed.formats.source import Source, Stream, check_names, check_tensor, one_dtype, parameters_by_name, read_config

WEIGHTS = {"model.safetensors": load_safetensors, "pytorch_model.bin": load_pt}
"""Name of the single file -> how it is read; in shards it is `model-00001-of-00002.safetensors` and so on, with an index."""


def is_one(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face directory with weights."""
    return any((folder / name).exists() or (folder / f"{name}.index.json").exists() for name in WEIGHTS)


def open_folder(folder: Path) -> Source:
    """Raises `UserError` naming what is missing, left over, mis-shaped or damaged; no tensor has been read by then."""
    theirs, config = read_config(folder)
    tensors = _map(folder)
    shapes = {parameter.name: weights.shapes_of(config, parameter) for parameter in weights.parameters(config)}
    expected = {name: shape for pieces in shapes.values() for name, shape in pieces.items()}
    check_names(folder, expected, tensors, FAMILIES[config.family].junk)
    for name, shape in expected.items():
        check_tensor(folder, name, tensors[name], shape)
    dtypes = {ours: one_dtype(folder, {name: tensors[name] for name in pieces}) for ours, pieces in shapes.items()}

    def stream() -> Stream:
        for parameter in weights.parameters(config):
            yield parameter.name, weights.join(config, parameter, tensors)

    return Source("Hugging Face directory", folder, config, theirs, dtypes, stream, folder)


def _map(folder: Path) -> dict[str, Tensor]:
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
    said = read_json(index)
    where = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index} has no weight_map of names and files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is not a file of this folder")
        if not (folder / file).is_file():
            raise UserError(f"{folder} lacks {file}, which {index.name} names")
        held = _table(folder / file, load(folder / file))
        check_names(folder / file, (name for name in where if where[name] == file), held, of=f"what {index.name} says")
        tensors |= held
    return tensors


def _table(path: Path, held: Any) -> dict[str, Tensor]:
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__}, not a table of tensors")
    return held


@dataclass(frozen=True)
class HuggingFace:
    """How to write a Hugging Face directory."""

    as_llama: bool = False
    """As a plain `LlamaForCausalLM`, for programs that do not know the family; else under its own names."""
    max_shard_size: int = 10 * 10**9
    """Bytes per file; a larger tensor has a file to itself."""

    def check(self, source: Source) -> None:
        """Raises `UserError` when the source cannot be written so."""
        FAMILIES[self._config(source).family].write_config(self._config(source))

    def size(self, source: Source, dtype: torch.dtype | None) -> int:
        """Bytes that will be written."""
        return sum(nbytes(*spec) for spec in self._specs(source, dtype).values())

    def write(self, source: Source, folder: Path, dtype: torch.dtype | None, report: Report) -> None:
        """Writes everything into an empty folder, one tensor in memory at a time."""
        shards = self._plan(self._specs(source, dtype))
        files = [create_safetensors(folder / path, specs) for path, specs in shards.items()]
        file_of = {name: file for file in files for name in file.specs}
        config = self._config(source)
        known = parameters_by_name(config)
        for ours, full in source.tensors():
            for name, tensor in weights.part(config, known[ours], full).items():
                report(file_of[name].write(name, tensor))
        for file in files:
            file.close()
        if len(shards) > 1:
            write_json(folder / "model.safetensors.index.json", _index(shards))
        sidecars.write(source, folder, config, dtype)
        if self.as_llama and (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            why_not = tokenizer_json.write(folder)
            if why_not:
                print(f"note: no tokenizer.json, {why_not}; stock transformers may not load the tokenizer as it should", flush=True)

    def _config(self, source: Source) -> ModelConfig:
        return replace(source.config, family="llama") if self.as_llama else source.config

    def _specs(self, source: Source, dtype: torch.dtype | None) -> Specs:
        config = self._config(source)
        return {
            name: (dtype or source.dtypes[parameter.name], shape)
            for parameter in weights.parameters(config)
            for name, shape in weights.shapes_of(config, parameter).items()
        }

    def _plan(self, specs: Specs) -> dict[str, Specs]:
        """File name -> what it holds: filled in the model's order."""
        shards: list[dict] = [{}]
        room = self.max_shard_size
        for name, spec in specs.items():
            size = nbytes(*spec)
            if size > room and shards[-1]:
                shards.append({})
                room = self.max_shard_size
            shards[-1][name] = spec
            room -= size
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": specs for i, specs in enumerate(shards, 1)}


def _index(shards: Mapping[str, Specs]) -> dict[str, Any]:
    size = sum(nbytes(*spec) for specs in shards.values() for spec in specs.values())
    return {"metadata": {"total_size": size}, "weight_map": {name: path for path, specs in shards.items() for name in specs}}
