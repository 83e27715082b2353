"""Writes MindFormers' `.ckpt` files, as `reading` reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ascendspeed.conversion import hf_assets
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.base import CheckpointFormat
from ascendspeed.conversion.formats.mindformers.reading import BYTES, NAMING_SCHEMES, NUMBER, TYPES
from ascendspeed.conversion.output_files import PreallocatedFile, Specs, nbytes
from ascendspeed.conversion.rank_files import NamingScheme
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES

FILE = "model.ckpt"
CHUNK_BYTES = 512 * 2**20
"""Bytes of one value, at most: MindSpore cuts larger tensors."""


@dataclass(frozen=True)
class MindFormersWriter:
    """Writer of a folder with one `.ckpt`, config.json and the tokenizer."""

    form: CheckpointFormat

    def check(self, reader: CheckpointReader) -> None:
        """Raises `UserError` if MindFormers has no model of the family."""
        self.form.check_family(reader.config.family, "write")

    def files(self, reader: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """Plans the file: q, k and v apart, or fused as the family's own Hugging Face names have them."""
        config = reader.config
        stored = [
            entry
            for parameter in param_mapping.parameters(config, _scheme(config.family).rows(config))
            for entry in param_mapping.stored_tensors(config, parameter)
        ]
        return [PlannedFile(FILE, tuple(stored), create_ckpt)]

    def finish(self, reader: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes config.json and the tokenizer."""
        hf_assets.write(reader, folder, reader.config, dtype)


def _scheme(family: str) -> NamingScheme:
    separate, fused = NAMING_SCHEMES
    qkv = next(row for row in FAMILIES[family].param_mappings if row.megatron_param.endswith("_qkv.weight"))
    return separate if len(qkv.hf_params) == 3 else fused


class CkptFile(PreallocatedFile):
    """A `.ckpt` in which large tensors are several values."""

    def __init__(self, path: Path, specs: Specs, chunks: dict[str, list[int]]) -> None:
        """`chunks`: tensor -> offset of the bytes of each of its values."""
        super().__init__(path, specs, {name: offsets[0] for name, offsets in chunks.items()})
        self.chunks = chunks

    def pieces(self, name: str, begin: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yields (offset in the file, bytes) of a range of a tensor, cut at the ends of values."""
        while view:
            chunk, position = divmod(begin, CHUNK_BYTES)
            size = min(len(view), CHUNK_BYTES - position)
            yield self.chunks[name][chunk] + position, view[:size]
            begin, view = begin + size, view[size:]


def create_ckpt(path: Path, specs: Specs) -> CkptFile:
    """Creates a `.ckpt` with the descriptions of its tensors and with space for them."""
    names_of_types = {dtype: name for name, dtype in TYPES.items()}
    chunks: dict[str, list[int]] = {}
    with open(path, "wb") as file:
        for name, (dtype, shape) in specs.items():
            size = nbytes(dtype, shape)
            for begin in range(0, size, CHUNK_BYTES):
                length = min(CHUNK_BYTES, size - begin)
                file.write(_value_header(name, shape, names_of_types[dtype], length))
                chunks.setdefault(name, []).append(file.tell())
                file.truncate(file.seek(length, 1))
    return CkptFile(path, specs, chunks)


def _value_header(tag: str, shape: tuple[int, ...], kind: str, length: int) -> bytes:
    """Everything of a value before the bytes of its tensor, which come last; see `reading` for the fields."""
    dims = b"".join(_key(1, NUMBER) + _varint(size) for size in shape)
    tensor = dims + _field(2, kind.encode()) + _key(3, BYTES) + _varint(length)
    value = _field(1, tag.encode()) + _key(2, BYTES) + _varint(len(tensor) + length) + tensor
    return _key(1, BYTES) + _varint(len(value) + length) + value


def _field(number: int, content: bytes) -> bytes:
    return _key(number, BYTES) + _varint(len(content)) + content


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Encodes an integer in 7 bits a byte, lowest first."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
