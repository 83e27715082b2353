"""Hugging Face directories: safetensors or .bin, one file or shards with an index; written as safetensors."""

from pathlib import Path
from typing import TYPE_CHECKING

from ascendspeed.conversion.formats.base import (
    CheckpointFormat,
    CheckpointWriter,
    Direction,
    ReadOptions,
    WriteOptions,
)
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.utils.text import parse_size

if TYPE_CHECKING:
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the single file; shards are `model-00001-of-00002.safetensors` and so on, with `NAME.index.json`.
"""


DESCRIPTION = "quant_model_description.json"
"""ModelSlim's table of tensors and their types, beside int8 weights."""


class HuggingFaceFormat(CheckpointFormat):
    """A Hugging Face directory under the parameter names of the model's own family."""

    name = "hf"
    summary = "the family's own names"
    contents = "Hugging Face weights"
    marker_files = "model.safetensors, pytorch_model.bin or their index"
    write_options = ("max_shard_size", "to_family", "copy_code")

    def supports(self, family: str, direction: Direction) -> bool:
        """True: every family is defined by its Hugging Face names."""
        return True

    def detect(self, folder: Path) -> bool:
        """True if there is a weight file or an index of shards."""
        names = (name for single in WEIGHT_FILES for name in (single, f"{single}.index.json"))
        return any((folder / name).exists() for name in (*names, DESCRIPTION))

    def takes_precedence(self, folder: Path) -> bool:
        """True for the output of transformers' Trainer, which leaves DeepSpeed's own files beside the
        weights.
        """
        return (folder / "trainer_state.json").exists()

    def open(self, folder: Path, options: ReadOptions) -> "CheckpointReader":
        """Opens the directory."""
        from ascendspeed.conversion.formats.huggingface.reading import open_directory

        return open_directory(folder, options.config_dir)

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns a writer of safetensors."""
        from ascendspeed.conversion.formats.huggingface.writing import HuggingFaceWriter

        return HuggingFaceWriter(options.to_family, parse_size(options.max_shard_size), options.copy_code)


class LlamaFormat(HuggingFaceFormat):
    """A Hugging Face directory of a plain LlamaForCausalLM, for programs that do not know InternLM; it is
    read as `hf`.
    """

    name = "hf-llama"
    summary = "plain LlamaForCausalLM"
    contents = marker_files = ""
    write_options = ("max_shard_size", "quantize", "static_rope")

    def supports(self, family: str, direction: Direction) -> bool:
        """True for families that are a Llama up to parameter names; read again, the model is a Llama."""
        if direction == "read":
            return family == REFERENCE.name
        return self.name in FAMILIES[family].extra_formats

    def detect(self, folder: Path) -> bool:
        """False: `hf` opens the directory."""
        return False

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns a writer of safetensors under Llama's names."""
        from ascendspeed.conversion.formats.huggingface.int8_writing import Int8Writer
        from ascendspeed.conversion.formats.huggingface.writing import HuggingFaceWriter

        size = parse_size(options.max_shard_size)
        if options.quantize is None:
            return HuggingFaceWriter(REFERENCE.name, size, static_rope=options.static_rope)
        return Int8Writer(REFERENCE.name, size, static_rope=options.static_rope, quantize=options.quantize)
