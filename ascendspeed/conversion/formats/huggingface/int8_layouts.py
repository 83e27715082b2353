"""Layouts of int8 weights in a Hugging Face directory: those of compressed-tensors and of ModelSlim."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.conversion.output_files import SAFETENSORS_TYPES, PreallocatedFile, Specs
from ascendspeed.models import int8
from ascendspeed.models.families import quantization_config
from ascendspeed.utils import safetensors_header

TYPES = SAFETENSORS_TYPES | {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}
LAYERS, WEIGHT, BIAS = "model.layers.", ".weight", ".bias"


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """True for the matrices of the layers of a Llama; embedding, output layer and norms keep their type."""
    return name.startswith(LAYERS) and name.endswith(WEIGHT) and len(shape) == 2


class Int8Layout(ABC):
    """Tensors that store a matrix in int8, and the entries of config.json that say so."""

    file: ClassVar[str] = "model.safetensors"
    """Name of the file of weights."""
    config_entries: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def stored(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Specs:
        """Names, types and shapes of the tensors that store the matrix `name`."""

    @abstractmethod
    def pack(self, name: str, block: Tensor) -> dict[str, Tensor]:
        """Quantises whole rows; returns the rows of the stored tensors that change with the row."""

    @abstractmethod
    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Stored tensors that do not depend on the weights."""

    @abstractmethod
    def unpack(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Returns the matrix `name` in fp32 from its stored tensors."""

    def plain_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Type in which a tensor that is not quantised is stored."""
        return dtype


class CompressedTensors(Int8Layout):
    """compressed-tensors, `pack-quantized`: four numbers + 128 in an int32, the first in its lowest byte."""

    config_entries: ClassVar[Mapping[str, Any]] = {quantization_config.KEY: quantization_config.W8A16}

    def stored(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Specs:
        """`weight_packed`, `weight_scale` in the type of the weights, `weight_shape`."""
        rows, columns = shape
        return {
            f"{name}_packed": (torch.int32, (rows, -(-columns // 4))),
            f"{name}_scale": (dtype, (rows, 1)),
            f"{name}_shape": (torch.int64, (2,)),
        }

    def pack(self, name: str, block: Tensor) -> dict[str, Tensor]:
        """Rows of `weight_packed` and `weight_scale`."""
        numbers, scale = int8.quantize(block, block.dtype)
        octets = (numbers.to(torch.int16) + 128).to(torch.uint8)
        padded = F.pad(octets, (0, -octets.size(1) % 4))
        return {f"{name}_packed": padded.view(torch.int32), f"{name}_scale": scale}

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """`weight_shape`."""
        return {f"{name}_shape": torch.tensor(shape)}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Numbers x scale."""
        octets = tensors[f"{name}_packed"].contiguous().view(torch.uint8)[:, : shape[1]]
        return (octets.float() - 128) * tensors[f"{name}_scale"].float()


class ModelSlim(Int8Layout):
    """ModelSlim's W8A16, which MindIE and vllm-ascend read: int8, with scale and offset in fp32."""

    file = "quant_model_weight_w8a16.safetensors"
    config_entries: ClassVar[Mapping[str, Any]] = {"quantize": "w8a16"}

    def stored(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Specs:
        """`weight`, `weight_scale`, `weight_offset`."""
        return {
            name: (torch.int8, shape),
            f"{name}_scale": (torch.float32, (shape[0], 1)),
            f"{name}_offset": (torch.float32, (shape[0], 1)),
        }

    def pack(self, name: str, block: Tensor) -> dict[str, Tensor]:
        """Rows of `weight` and `weight_scale`."""
        numbers, scale = int8.quantize(block, torch.float32)
        return {name: numbers, f"{name}_scale": scale}

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """`weight_offset`, which is 0: the scales are symmetric."""
        return {f"{name}_offset": torch.zeros(shape[0], 1)}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """(Numbers + offset) x scale."""
        offset, scale = tensors[f"{name}_offset"].float(), tensors[f"{name}_scale"].float()
        return (tensors[name].float() + offset) * scale

    def plain_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """fp32 for a bias in bf16 of a quantised matrix, as MindIE's document demands."""
        return torch.float32 if name.endswith(BIAS) and dtype == torch.bfloat16 else dtype


LAYOUTS: dict[str, type[Int8Layout]] = {"w8a16": CompressedTensors, "modelslim-w8a16": ModelSlim}
"""Value of --quantize -> layout."""


class Int8File(PreallocatedFile):
    """A safetensors file whose matrices of layers are quantised row by row when they are written."""

    def __init__(self, path: Path, specs: Specs, layout: Int8Layout) -> None:
        """Creates the file with its header, its constant tensors, and space for the others."""
        self.layout = layout
        stored = stored_specs(layout, specs)
        named = {name: (TYPES[dtype], shape) for name, (dtype, shape) in stored.items()}
        first_bytes, header = safetensors_header.encode(named, {"format": "pt"})
        with open(path, "wb") as file:
            file.write(first_bytes)
            file.truncate(header.file_size)
        super().__init__(path, specs, {name: header.offset(name) for name in stored})
        for name, (_, shape) in specs.items():
            if is_quantized(name, shape):
                for stored_name, tensor in layout.constants(name, shape).items():
                    self._write_rows(stored_name, 0, tensor)

    def write(self, name: str, row: int, block: Tensor) -> None:
        """Quantises whole rows and writes them from row `row` on."""
        dtype, shape = self.specs[name]
        if is_quantized(name, shape):
            parts = self.layout.pack(name, block)
        else:
            parts = {name: block.to(self.layout.plain_dtype(name, dtype))}
        for stored_name, part in parts.items():
            self._write_rows(stored_name, row, part)

    def _write_rows(self, name: str, row: int, part: Tensor) -> None:
        width = part[:1].nbytes
        view = memoryview(part.contiguous().flatten().view(torch.uint8).numpy())
        self.write_bytes(self.offsets[name] + row * width, view)


def stored_specs(layout: Int8Layout, specs: Specs) -> Specs:
    """Names, types and shapes of the stored tensors of plain ones."""
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (dtype, shape) in specs.items():
        if is_quantized(name, shape):
            stored |= layout.stored(name, dtype, shape)
        else:
            stored[name] = layout.plain_dtype(name, dtype), shape
    return stored
