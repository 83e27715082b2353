"""Writes Hugging Face directories as safetensors."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import hf_assets, model_card
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.huggingface import LlamaFormat
from ascendspeed.conversion.output_files import Specs, create_safetensors, nbytes, write_json
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.gpt.rope import rope_base
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


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
    static_rope: int | None = None
    """Replaces dynamic NTK by its base at this length (`with_static_rope`)."""

    def check(self, reader: CheckpointReader) -> None:
        """Raises `UserError` if the model cannot be written under these names."""
        if self.family == REFERENCE.name:
            LlamaFormat().check_family(reader.config.family, "write")
            if not self.static_rope:
                note_dynamic_rope(reader.config)
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
            stored = [self.stored_specs(file, reader, dtype) for file in files]
            weight_map = {
                name: file.path for file, specs in zip(files, stored, strict=True) for name in specs
            }
            total = sum(nbytes(*spec) for specs in stored for spec in specs.values())
            write_json(
                folder / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        hf_assets.write(
            reader, folder, self._config(reader), dtype, for_transformers=True, copy_code=self.copy_code
        )
        loads = model_card.what_loads(FAMILIES[self._config(reader).family], reader.config.reward_head)
        card = model_card.text(reader, loads)
        (folder / model_card.FILE).write_text(card, encoding="utf-8")

    def stored_specs(self, file: PlannedFile, reader: CheckpointReader, dtype: torch.dtype | None) -> Specs:
        """Tensors of a file as they are stored."""
        return file.specs(reader, dtype)

    def _config(self, reader: CheckpointReader) -> ModelConfig:
        config = replace(reader.config, family=self.family or reader.config.family)
        return with_static_rope(config, self.static_rope) if self.static_rope else config


def with_static_rope(config: ModelConfig, length: int) -> ModelConfig:
    """Returns the configuration with the rotary base that dynamic NTK has at `length` tokens.

    A program without dynamic NTK then computes texts of that length as the model defines them, and shorter
    ones with the same base. Raises `UserError`.
    """
    trained = config.max_position_embeddings
    if config.rope_scaling_type != "dynamic":
        raise UserError(
            f"--static-rope is for dynamic rope scaling; this model has {config.rope_scaling_type}"
        )
    if length <= trained:
        raise UserError(
            f"--static-rope {length} is not beyond the trained length of {trained}, "
            "up to which dynamic rope scaling changes nothing"
        )
    return replace(
        config,
        rotary_base=rope_base(config, length),
        rope_scaling_type="none",
        rope_scaling_factor=1.0,
        max_position_embeddings=length,
    )


def note_dynamic_rope(config: ModelConfig) -> None:
    """Logs the length up to which programs other than this one compute a model with dynamic NTK."""
    if config.rope_scaling_type == "dynamic":
        logger.info(
            f"note: dynamic rope scaling: vLLM, SGLang and LMDeploy are right up to the trained "
            f"{config.max_position_embeddings} tokens only; for longer prompts give --static-rope LENGTH "
            "(docs/hand-over.md)"
        )
