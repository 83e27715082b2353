"""`CheckpointReader`: a checkpoint of any format as an architecture and a stream of full tensors under
Megatron-core names.
"""

import ctypes
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.output_files import SAFETENSORS_TYPES, nbytes
from ascendspeed.models import param_mapping
from ascendspeed.models.families import family_of
from ascendspeed.models.param_mapping import Parameter, Slice2D
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

THREADS = 4
"""Threads that read from a checkpoint at the same time, at most."""
READ_AHEAD_BYTES = 128 * 2**20
"""Bytes after the tensor that is read which the system loads from the disk meanwhile."""
LARGE_BLOCK_BYTES = 256 * 2**10
"""Bytes of a block from which on its tensor is taken to be read whole."""
ReadBlock = Callable[[str, Slice2D], Tensor]
"""(parameter name, rectangle of the full tensor seen as a matrix) -> that matrix; it may be a read-only view
of a file.
"""


@dataclass(frozen=True)
class CheckpointReader:
    """An opened checkpoint. Opening reads names, shapes and types only, and checks them all; any thread may
    read blocks.
    """

    description: str
    """Format in words, such as "Megatron rank files for TP 2 x PP 1"."""
    path: Path
    config: ModelConfig
    config_json: dict[str, Any]
    """The config.json of the checkpoint, for what `config` does not hold (token ids); empty if there is none.
    """
    dtypes: Mapping[str, torch.dtype]
    """Parameter name -> type on disk, in the order of `param_mapping.parameters`."""
    read_block: ReadBlock
    assets_dir: Path | None
    """Folder that should hold the tokenizer and the generation settings; None: unknown."""
    parallel_sizes: tuple[int, int] | None = None
    """Tensor- and pipeline-parallel sizes of rank files; None for other formats."""
    chat_template: str | None = None
    """Name of the chat template that the model was trained with, if the checkpoint records one."""
    training_notes: str | None = None
    """Markdown on its training for the model card (`model_card.training_section`)."""

    def size(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors, cast to `dtype` if it is given."""
        return sum(
            nbytes(dtype or self.dtypes[p.name], p.shape) for p in param_mapping.parameters(self.config)
        )

    def names(self) -> list[str]:
        """Names of all parameters, in the model's order."""
        return list(self.dtypes)

    def tensors(self, first: int = 0, step: int = 1) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full unpadded tensor) of every `step`-th parameter from `first` on, in the model's
        order.

        A tensor may be a read-only view of a file.
        """
        for parameter in list(param_mapping.parameters(self.config))[first::step]:
            yield (
                parameter.name,
                self.read_block(parameter.name, full_slice(parameter)).reshape(parameter.shape),
            )


def full_slice(parameter: Parameter) -> Slice2D:
    """The whole of a parameter seen as a matrix."""
    return Slice2D(0, 0, 0, 0, parameter.shape[0], math.prod(parameter.shape[1:]))


def from_stored(stored: Mapping[str, Sequence[tuple[Tensor, Sequence[Slice2D]]]]) -> ReadBlock:
    """Reads from memory-mapped tensors: parameter name -> matrices, each with the rectangles of the parameter
    in it, in the order in which a conversion reads them.

    A large block makes the system load its tensor and the following ones, so that the disk does not wait for
    the processor; small blocks (`weights_identity.sampled`) load nothing but themselves.
    """
    names = list(stored)
    positions = {name: position for position, name in enumerate(names)}
    begun: set[str] = set()
    loaded: set[str] = set()

    def read_ahead(name: str) -> None:
        """Loads a parameter and about `READ_AHEAD_BYTES` of those after it, each once."""
        size = 0
        for following in names[positions[name] :]:
            matrices = [matrix for matrix, _ in stored[following]]
            if following not in loaded:
                loaded.add(following)
                for matrix in matrices:
                    _load(matrix)
            if following != name:
                size += sum(matrix.nbytes for matrix in matrices)
            if size >= READ_AHEAD_BYTES:
                return

    def read_block(name: str, wanted: Slice2D) -> Tensor:
        size = wanted.rows * wanted.columns * stored[name][0][0].itemsize
        if name not in begun and size >= LARGE_BLOCK_BYTES:
            begun.add(name)
            read_ahead(name)
        return param_mapping.assemble(stored[name], wanted)

    return read_block


def _load(tensor: Tensor) -> None:
    """Asks the system to load a mapped tensor; interleaved reads from several files would load it in small
    parts.
    """
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - first), mmap.MADV_WILLNEED
    )


def from_factory(make: Callable[[str], Tensor]) -> ReadBlock:
    """Reads from full tensors that are computed on demand; the most recent ones are cached, one for each
    reading thread.
    """
    cache: dict[str, Tensor] = {}
    lock = threading.Lock()

    def read_block(name: str, wanted: Slice2D) -> Tensor:
        with lock:
            if name not in cache:
                for oldest in list(cache)[: len(cache) + 1 - THREADS]:
                    del cache[oldest]
                cache[name] = param_mapping.as_matrix(make(name))
            full = cache[name]
        return full[wanted.row : wanted.row + wanted.rows, wanted.column : wanted.column + wanted.columns]

    return read_block


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Reads the config.json of a folder: as it is, and as a `ModelConfig`. Raises `UserError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json: copy the one of the Hugging Face model there, or name its folder "
            f"(--config DIR)"
        )
    config_json = read_json_object(path)
    try:
        return config_json, family_of(config_json).read_config(config_json)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def check_tensor(path: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raises `UserError` unless it is a tensor of weights of this shape."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in SAFETENSORS_TYPES:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{path}: {name} is of type {kind}; weights are float32, bfloat16 or float16")
    if tuple(tensor.shape) != shape:
        raise UserError(f"{path}: {name} is {list(tensor.shape)}, but config.json says {list(shape)}")


def common_dtype(path: Path, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The type that the stored parts of one parameter share. Raises `UserError` if they differ: fusing them
    would change bits.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        types = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise UserError(f"{path}: one parameter of several types: {types}")
    return dtypes.pop()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are equal byte by byte (NaN equals itself, 0 is not -0); compares 1024 rows at a
    time.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.uint8)
    pairs = zip(a.split(1024), b.split(1024), strict=True)
    return all(torch.equal(x.contiguous().view(integers), y.contiguous().view(integers)) for x, y in pairs)
