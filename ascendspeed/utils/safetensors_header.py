"""Header of a safetensors file: 8 bytes of length, then JSON: name -> element type, shape and byte range."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ascendspeed.utils.safe_io import parse_json

MAX_HEADER = 100_000_000
"""Bytes of header that the safetensors library accepts."""
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}
"""Element type as a header names it -> bytes of an element."""


class Header(NamedTuple):
    """A header that was read or is to be written."""

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    """Name -> {"dtype", "shape", "data_offsets"}; offsets count from `start`."""
    start: int
    """Position in the file of the first tensor's first byte."""

    def offset(self, name: str) -> int:
        """Position of a tensor in the file."""
        return self.start + self.tensors[name]["data_offsets"][0]

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.start + max((entry["data_offsets"][1] for entry in self.tensors.values()), default=0)


def encode(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """The first bytes of a file that will hold tensors of these element types and shapes, in this order,
    without gaps.

    Raises `ValueError` if the header is larger than the safetensors library accepts.
    """
    tensors: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in specs.items():
        start = end
        end = start + ITEM_SIZES[dtype] * prod(shape)
        tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": dict(metadata), **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"a file of {len(specs)} tensors has a header of {len(text)} bytes, more than safetensors allows"
        )
    return len(text).to_bytes(8, "little") + text, Header(dict(metadata), tensors, 8 + len(text))


def read(path: Path) -> Header:
    """Reads the header of a file.

    Raises `OSError`, or `ValueError` if it is too long, cut off or not valid JSON.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        table = parse_json(file.read(length))
    if not isinstance(table, dict):
        raise ValueError("its header is not a table")
    return Header(table.pop("__metadata__", {}), table, 8 + length)


def declared_size(path: Path) -> int:
    """Bytes that a file should have by its header, or by the part of the header that is there; 0 if it is not
    readable.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= MAX_HEADER else b""
    if length > MAX_HEADER:
        return 0
    if len(text) < length or not length:
        return 8 + length
    try:
        table = parse_json(text)
        end = max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return 0
    return 8 + length + end if type(end) is int and end < 2**63 else 0
