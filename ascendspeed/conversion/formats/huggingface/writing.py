"""Writes Hugging Face directories as safetensors."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import hf_assets, model_card
from ascendspeed.conversion import write as writing
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.huggingface import LlamaFormat
from ascendspeed.conversion.output_files import create_safetensors, nbytes, write_json
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, REFERENCE


@dataclass(frozen=True)
class HuggingFaceWriter:
    """Writer of a Hugging Face directory."""

    family: str | None = None
    """Writes under the names of this family (`REFERENCE.name`: for programs that support no other); None: the
    model's own.
    """
    max_shard_size: int = 10 * 10**9
    """Bytes of one file; a larger tensor gets a file of its own."""
    copy_code: bool = False
    """Copies the source's `*.py`, unexecuted, and keeps the entries of its JSON files that refer to them."""

    def check(self, reader: CheckpointReader) -> None:
        """Raises `UserError` if the model cannot be written under these names."""
        if self.family == REFERENCE.name:
            LlamaFormat().check_family(reader.config.family, "write")
        config = self._config(reader)
        FAMILIES[config.family].write_config(config)
        if self.copy_code:
            hf_assets.check_code(reader, config)

    def files(self, reader: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """Plans the shards, filled in the model's order."""
        config = self._config(reader)
        shards: list[list[param_mapping.StoredTensor]] = [[]]
        bytes_left = self.max_shard_size
        for parameter in param_mapping.parameters(config):
            for entry in param_mapping.stored_tensors(config, parameter):
                size = nbytes(dtype or reader.dtypes[parameter.name], entry.shape)
                if size > bytes_left and shards[-1]:
                    shards.append([])
                    bytes_left = self.max_shard_size
                shards[-1].append(entry)
                bytes_left -= size
        if len(shards) == 1:
            return [PlannedFile("model.safetensors", tuple(shards[0]), create_safetensors)]
        return [
            PlannedFile(f"model-{i:05d}-of-{len(shards):05d}.safetensors", tuple(shard), create_safetensors)
            for i, shard in enumerate(shards, start=1)
        ]

    def finish(self, reader: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the index, config.json and the tokenizer."""
        files = self.files(reader, dtype)
        if len(files) > 1:
            weight_map = {entry.name: file.path for file in files for entry in file.tensors}
            total = writing.size(reader, files, dtype)
            write_json(
                folder / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        hf_assets.write(
            reader, folder, self._config(reader), dtype, for_transformers=True, copy_code=self.copy_code
        )
        card = model_card.text(reader, model_card.what_loads(FAMILIES[self._config(reader).family]))
        (folder / model_card.FILE).write_text(card, encoding="utf-8")

    def _config(self, reader: CheckpointReader) -> ModelConfig:
        return replace(reader.config, family=self.family or reader.config.family)
