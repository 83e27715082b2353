"""Files of tensors that others wrote: memory-mapped, never believed. Whatever is wrong with one is a `UserError` that names it."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from torch import Tensor

from ascendspeed.conversion.safe_pickle import stand_ins
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked, parse_json, plain_name, read_json, read_table

__all__ = ["checked", "load_pt", "load_safetensors", "read_index", "read_json", "read_table"]
AGAIN = "download or copy it again"
LONGEST_HEADER = 100_000_000
"""Bytes that the library reads of a header."""
NOTHING: Mapping[str, type] = MappingProxyType({})


def load_safetensors(path: Path, root: Path | None = None) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, memory-mapped: nothing but the header is read before it is used.

    The library itself refuses a header that is too long or no JSON, element types that it does not know, and offsets that overlap,
    leave holes or end elsewhere than the file; a name that stands there twice it lets pass. `root`: see `inputs.checked`.
    """
    checked(path, root)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            _header(path)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (
        Exception
    ) as error:  # also element types that the library knows and torch does not, in whatever words
        _check_length(path)
        raise UserError(f"{path} is damaged or no safetensors file ({_first_line(error)}): {AGAIN}") from None


def _header(path: Path) -> None:
    """Raises `ValueError` when something stands twice in a header that the library has accepted."""
    with open(path, "rb") as file:
        parse_json(file.read(int.from_bytes(file.read(8), "little")))


def _check_length(path: Path) -> None:
    """Raises `UserError` when a safetensors file is shorter than its own first bytes say."""
    size, whole = path.stat().st_size, _length_said(path)
    if whole and size < whole:
        raise UserError(f"{path} is cut off, it has {size} of {whole} bytes: {AGAIN}")


def _length_said(path: Path) -> int:
    """Bytes of a safetensors file by its header, or by what there is of it; 0 where that makes no sense."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if header > LONGEST_HEADER:
            return 0
        text = file.read(header)
    if len(text) < header or not header:
        return 8 + header
    try:
        end = max(
            entry["data_offsets"][1] for name, entry in parse_json(text).items() if name != "__metadata__"
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return 0
    return 8 + header + end if type(end) is int and end < 2**63 else 0


def load_pt(path: Path, root: Path | None = None, known: Mapping[str, type] = NOTHING) -> Any:
    """What `torch.save` wrote, memory-mapped. Only tensors and plain values are unpickled (`inert`): nothing in the file is run.

    Files of before torch 1.6 are read too, but into memory, and only if they hold nothing else. `root`: see `inputs.checked`;
    `known`: `inert.stand_ins`.
    """
    checked(path, root)
    with open(path, "rb") as file:
        start = file.read(4)
    is_zip = start == b"PK\x03\x04"
    if not start or (is_zip and not zipfile.is_zipfile(path)):  # a zip says at its end what it holds
        raise UserError(f"{path} is cut off, {'its end is missing' if start else 'it is empty'}: {AGAIN}")
    try:
        if is_zip:
            _records(path)
        with (
            torch.serialization.safe_globals(stand_ins(path, known) if is_zip else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of a pickle protocol that other programs write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle ends in whatever its instructions run into
        raise UserError(
            f"{path} is damaged ({AGAIN}), or holds more than tensors (then it is not loaded: it could run code): {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """Without torch's advice to load it all the same."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return f"{refused[1]} is no plain data" if refused else inner[1] if inner else _first_line(error)


def _records(path: Path) -> None:
    """Raises `ValueError` when a record is compressed: torch.save never does, and a small file could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{packed[0]!r} in it is compressed, which torch.save does not do")


def read_index(path: Path, root: Path | None = None) -> dict[str, str]:
    """Tensor -> file in the same folder, as `model.safetensors.index.json` says; all are there. Raises `UserError`."""
    where = read_table(path, root).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{path} has no weight_map of names and files: {AGAIN}")
    for file in sorted({plain_name(file, path) for file in where.values()}):
        if not (path.parent / file).is_file():
            raise UserError(f"{path.parent} lacks {file}, which {path.name} names: {AGAIN}")
    return where


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
