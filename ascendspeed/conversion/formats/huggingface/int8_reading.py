"""Reads the int8 weights of a Hugging Face directory as matrices in fp32."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.conversion.formats.huggingface import DESCRIPTION
from ascendspeed.conversion.formats.huggingface.int8_layouts import (
    CompressedTensors,
    Int8Layout,
    ModelSlim,
    is_quantized,
)
from ascendspeed.conversion.load_files import load_safetensors, read_json_object
from ascendspeed.models.families import quantization_config
from ascendspeed.utils.errors import UserError

KEYS = {key for layout in (CompressedTensors, ModelSlim) for key in layout.config_entries}


@dataclass(frozen=True)
class Int8Tensors:
    """Stored tensors of a quantised directory."""

    folder: Path
    layout: Int8Layout
    stored: Mapping[str, Tensor]

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Returns a placeholder for every matrix in int8 beside the other tensors.

        Raises `UserError` for stored tensors that are missing or have another type or shape.
        """
        tensors = dict(self.stored)
        for name, shape in expected.items():
            if not is_quantized(name, shape):
                continue
            for part, (dtype, size) in self.layout.stored(name, torch.float32, shape).items():
                self._check_part(part, dtype, size)
                tensors.pop(part)
            tensors[name] = torch.empty(shape, device="meta")
        return tensors

    def _check_part(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        tensor = self.stored.get(name)
        if tensor is None:
            raise UserError(f"{self.folder} lacks {name}, which its quantisation needs")
        has_type = tensor.dtype.is_floating_point if dtype.is_floating_point else tensor.dtype == dtype
        if tuple(tensor.shape) != shape or not has_type:
            raise UserError(
                f"{self.folder}: {name} is {list(tensor.shape)} {tensor.dtype}, "
                f"but config.json says {list(shape)} {dtype}"
            )

    def matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor by its plain name, dequantised if it is in int8."""
        if is_quantized(name, shape):
            return self.layout.unpack(name, self.stored, shape)
        return self.stored[name]


def find_layout(folder: Path, config_json: Mapping[str, Any]) -> Int8Layout | None:
    """Returns the layout of a quantised directory, None for a plain one. Raises `UserError`."""
    if (folder / DESCRIPTION).is_file():
        _check_description(folder / DESCRIPTION)
        return ModelSlim()
    return CompressedTensors() if config_json.get(quantization_config.KEY) else None


def _check_description(path: Path) -> None:
    table = read_json_object(path)
    other = sorted(
        f"{name} {kind}" for name, kind in table.items() if "." in name and kind not in ("W8A16", "FLOAT")
    )
    if table.get("model_quant_type") != "W8A16" or other:
        kind = other[0] if other else f"model_quant_type {table.get('model_quant_type')}"
        raise UserError(
            f"{path}: {kind} is not supported, only W8A16 (int8 weights with a scale per channel)"
        )


def read_modelslim(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of ModelSlim's file. Raises `UserError`."""
    path = folder / ModelSlim.file
    if not path.is_file():
        raise UserError(f"{folder} has {DESCRIPTION}, but no {path.name}")
    return load_safetensors(path)
