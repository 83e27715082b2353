"""GGUF files of llama.cpp and Ollama: one file with weights, tokenizer, chat template and stop tokens."""

from pathlib import Path

from ascendspeed.conversion.formats.base import CheckpointFormat, CheckpointWriter, Direction, WriteOptions
from ascendspeed.models.families import FAMILIES


class GgufFormat(CheckpointFormat):
    """A folder with `model.gguf` and a Modelfile of Ollama; written only."""

    name = "gguf"
    summary = "one file of llama.cpp, with a Modelfile of Ollama"
    write_options = ("gguf_type",)

    def supports(self, family: str, direction: Direction) -> bool:
        """True for writing the families that llama.cpp computes."""
        return direction == "write" and FAMILIES[family].gguf_architecture is not None

    def detect(self, folder: Path) -> bool:
        """False: GGUF files are not read."""
        return False

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns a writer of one GGUF file."""
        from ascendspeed.conversion.formats.gguf.writing import GgufWriter

        return GgufWriter(self, options.gguf_type)
