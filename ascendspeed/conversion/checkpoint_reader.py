"""A checkpoint to read, whatever its format: an architecture and a stream of full tensors by our names."""

import ctypes
import hashlib
import json
import math
import mmap
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from ascendspeed.utils.text import shorten_list

THREADS = 4
"""That read from a source at the same time, at most."""
EDGE, SPREAD = 16, 8
"""Of a fingerprint: rows at each end of a vocabulary; parts of a matrix, where each begins a row is read."""
Block = Callable[[str, Slice2D], Tensor]
"""(our name, rectangle of the full tensor seen as a matrix) -> the matrix there; it may be a read-only view of a file."""


@dataclass(frozen=True)
class CheckpointReader:
    """Opening one reads names, shapes and types only, and checks them all; the tensors are read block by block, by any thread."""

    kind: str
    """Format, in words."""
    where: Path
    config: ModelConfig
    theirs: dict[str, Any]
    """The config.json it came with, for what `config` does not hold (token ids); empty when there is none."""
    dtypes: Mapping[str, torch.dtype]
    """Our name -> type on disk, in the order of `weights.parameters`."""
    block: Block
    beside: Path | None
    """Folder that should hold the tokenizer and the generation settings; None: nobody named one."""
    grid: tuple[int, int] | None = None
    """Tensor-parallel ranks and pipeline stages that rank files were written for; None: it is not in rank files."""

    def size(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors, cast to `dtype` when one is given."""
        return sum(
            nbytes(dtype or self.dtypes[p.name], p.shape) for p in param_mapping.parameters(self.config)
        )

    def names(self) -> list[str]:
        """Of all parameters, in the model's order."""
        return list(self.dtypes)

    def fingerprint(self) -> str:
        """SHA-256 over the architecture and some numbers of every parameter: the same for the same weights in any format.

        A few rows of each matrix are read, as fp32: enough to know another model of the same architecture, weights that were
        trained further or that adapters were merged into, and done at once.
        """
        architecture = {
            k: v for k, v in asdict(self.config).items() if k not in ("family", "init_method_std")
        }
        sha = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
        for p in param_mapping.parameters(self.config):
            sha.update(f"{p.name} {list(p.shape)}\n".encode())
            for tile in _fingers(p):
                sha.update(self.block(p.name, tile).float().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def tensors(self, first: int = 0, step: int = 1) -> Iterator[tuple[str, Tensor]]:
        """(our name, full unpadded tensor) of every parameter in the model's order; a tensor may be a read-only view of a file.

        Of every `step`-th one, from `first` on.
        """
        for parameter in list(param_mapping.parameters(self.config))[first::step]:
            rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
            yield (
                parameter.name,
                self.block(parameter.name, Slice2D(0, 0, 0, 0, rows, columns)).reshape(parameter.shape),
            )


def _fingers(parameter: Parameter) -> Iterator[Slice2D]:
    """What a fingerprint reads: a whole vector; of a matrix the first and the last row, and some between at equal distances.

    Of a vocabulary (embedding, head) more rows at both ends, where the tokens lie that a model is given later.
    """
    if len(parameter.shape) == 1:
        yield Slice2D(0, 0, 0, 0, parameter.shape[0], 1)
        return
    rows, columns = parameter.shape
    edge = min(rows, EDGE if parameter.mapping.partition == "vocab" else 1)
    yield Slice2D(0, 0, 0, 0, edge, columns)
    for part in range(1, SPREAD):
        yield Slice2D(rows * part // SPREAD, 0, 0, 0, 1, columns)
    yield Slice2D(rows - edge, 0, 0, 0, edge, columns)


def from_pieces(pieces: Mapping[str, Sequence[tuple[Tensor, Sequence[Slice2D]]]]) -> Block:
    """Reads from stored tensors: our name -> the matrices that hold it, and what of it they hold."""
    begun: set[str] = set()

    def block(name: str, wanted: Slice2D) -> Tensor:
        if name not in begun:
            begun.add(name)
            for matrix, _ in pieces[name]:
                _read_ahead(matrix)
        return param_mapping.assemble(pieces[name], wanted)

    return block


def _read_ahead(tensor: Tensor) -> None:
    """Asks the system to bring a mapped tensor into memory; read bit by bit from several files it comes in small pieces."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - first), mmap.MADV_WILLNEED
    )


def from_maker(make: Callable[[str], Tensor]) -> Block:
    """Reads from whole tensors that are made when they are asked for; the last ones are kept, one for every thread that may ask."""
    kept: dict[str, Tensor] = {}
    lock = threading.Lock()

    def block(name: str, wanted: Slice2D) -> Tensor:
        with lock:
            if name not in kept:
                for oldest in list(kept)[: len(kept) + 1 - THREADS]:
                    del kept[oldest]
                kept[name] = param_mapping.as_matrix(make(name))
            full = kept[name]
        return full[wanted.row : wanted.row + wanted.rows, wanted.column : wanted.column + wanted.columns]

    return block


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The config.json of a folder, as it stands and as ours. Raises `UserError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json: copy the one of the Hugging Face model there, or name its folder (--config DIR)"
        )
    theirs = read_json_object(path)
    try:
        return theirs, family_of(theirs).read_config(theirs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def check_names(
    where: Path,
    expected: Iterable[str],
    found: Iterable[str],
    junk: Iterable[str] = (),
    of: str = "the model of its config.json",
) -> None:
    """Raises `UserError` that names what is missing and what is left over, `junk` (regular expressions) aside."""
    expected, found = set(expected), set(found)
    missing = sorted(expected - found)
    extra = sorted(
        name for name in found - expected if not any(re.fullmatch(pattern, name) for pattern in junk)
    )
    faults = [
        f"{what} {shorten_list(names)}"
        for what, names in (("lacks", missing), ("has left over", extra))
        if names
    ]
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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same byte by byte (NaN equals itself, 0 is not -0); read in pieces."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.uint8)
    pairs = zip(a.split(1024), b.split(1024), strict=True)
    return all(torch.equal(x.contiguous().view(integers), y.contiguous().view(integers)) for x, y in pairs)
