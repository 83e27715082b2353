"""A checkpoint to read, whatever its format: an architecture and a stream of full tensors by our names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed import weights
from ascendspeed.config import ModelConfig
from ascendspeed.errors import UserError
from ascendspeed.families import family_of
from ascendspeed.formats.files import SAFETENSORS_TYPES, nbytes, read_json

Stream = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """Opening one reads names, shapes and types only, and checks them all; the tensors come one at a time."""

    kind: str
    """Format, in words."""
    where: Path
    config: ModelConfig
    theirs: dict[str, Any]
    """The config.json it came with, for what `config` does not hold (token ids); empty when there is none."""
    dtypes: Mapping[str, torch.dtype]
    """Our name -> type on disk, in the order of `weights.parameters`."""
    stream: Callable[[], Stream]
    beside: Path | None
    """Folder that should hold the tokenizer and the generation settings; None: nobody named one."""

    def size(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors, cast to `dtype` when one is given."""
        return sum(nbytes(dtype or self.dtypes[p.name], p.shape) for p in weights.parameters(self.config))

    def names(self) -> list[str]:
        """Of all parameters, in the model's order."""
        return list(self.dtypes)

    def tensors(self) -> Stream:
        """(our name, full unpadded tensor) of every parameter in the model's order; a tensor may be a read-only view of a file."""
        return self.stream()


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The config.json of a folder, as it stands and as ours. Raises `UserError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: copy the one of the Hugging Face model there")
    theirs = read_json(path)
    if not isinstance(theirs, dict):
        raise UserError(f"{path} is not a table")
    try:
        return theirs, family_of(theirs).read_config(theirs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def check_names(
    where: Path, expected: Iterable[str], found: Iterable[str], junk: Iterable[str] = (), of: str = "the model of its config.json"
) -> None:
    """Raises `UserError` that names what is missing and what is left over, `junk` (regular expressions) aside."""
    expected, found = set(expected), set(found)
    missing = sorted(expected - found)
    extra = sorted(name for name in found - expected if not any(re.fullmatch(pattern, name) for pattern in junk))
    faults = [f"{what} {some(names)}" for what, names in (("lacks", missing), ("has left over", extra)) if names]
    if faults:
        raise UserError(f"{where} does not hold {of}: it {'; it '.join(faults)}")


def check_tensor(where: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raises `UserError` when it is no tensor of weights or not of this shape."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in SAFETENSORS_TYPES:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{where}: {name} is of type {kind}; weights are float32, bfloat16 or float16")
    if tuple(tensor.shape) != shape:
        raise UserError(f"{where}: {name} is {list(tensor.shape)}, but config.json says {list(shape)}")


def one_dtype(where: Path, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The type that the pieces of one parameter share. Raises `UserError` when they differ: fusing them would change bits."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        said = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise UserError(f"{where}: one parameter of several types: {said}")
    return dtypes.pop()


def some(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def parameters_by_name(config: ModelConfig) -> dict[str, weights.Parameter]:
    """Every parameter of the model, in order, by its name."""
    return {parameter.name: parameter for parameter in weights.parameters(config)}
