"""Writes Hugging Face directories of a plain Llama with the weights of its layers in int8."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.huggingface import DESCRIPTION
from ascendspeed.conversion.formats.huggingface.int8_layouts import (
    BIAS,
    LAYERS,
    LAYOUTS,
    Int8File,
    Int8Layout,
    ModelSlim,
    is_quantized,
    stored_specs,
)
from ascendspeed.conversion.formats.huggingface.writing import HuggingFaceWriter
from ascendspeed.conversion.output_files import Specs, write_json
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.utils.safe_io import read_json_object


@dataclass(frozen=True)
class Int8Writer(HuggingFaceWriter):
    """Writer of a quantised directory."""

    quantize: str = "w8a16"
    """Key of `LAYOUTS`."""

    @property
    def layout(self) -> Int8Layout:
        """Layout of the int8 tensors."""
        return LAYOUTS[self.quantize]()

    def files(self, reader: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """Plans the shards; ModelSlim's directory has one file."""
        layout = self.layout
        files = super().files(reader, dtype)
        if isinstance(layout, ModelSlim):
            tensors = tuple(entry for file in files for entry in file.tensors)
            files = [PlannedFile(layout.file, tensors, files[0].create)]
        return [replace(file, create=partial(_create, layout)) for file in files]

    def stored_specs(self, file: PlannedFile, reader: CheckpointReader, dtype: torch.dtype | None) -> Specs:
        """Tensors of a file as they are stored."""
        return stored_specs(self.layout, file.specs(reader, dtype))

    def finish(self, reader: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Adds the entries of config.json, and ModelSlim's description."""
        super().finish(reader, folder, dtype)
        config_json = read_json_object(folder / "config.json") | dict(self.layout.config_entries)
        write_json(folder / "config.json", config_json)
        if isinstance(self.layout, ModelSlim):
            (file,) = self.files(reader, dtype)
            write_json(folder / DESCRIPTION, _description(self.layout, file.specs(reader, dtype)))


def _create(layout: Int8Layout, path: Path, specs: Specs) -> Int8File:
    return Int8File(path, specs, layout)


def _description(layout: Int8Layout, specs: Specs) -> Mapping[str, Any]:
    """ModelSlim's table: tensor -> W8A16, or FLOAT for one that is not quantised."""
    table = {"model_quant_type": "W8A16"}
    for name, (dtype, shape) in specs.items():
        if name.startswith(LAYERS) and name.endswith(BIAS):
            table[name] = "W8A16"  # all tensors of a linear have one type
        elif is_quantized(name, shape):
            table |= dict.fromkeys(layout.stored(name, dtype, shape), "W8A16")
        else:
            table[name] = "FLOAT"
    return table
