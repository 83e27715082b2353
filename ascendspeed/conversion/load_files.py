"""Loads untrusted files of tensors, memory-mapped; a damaged or unsafe file raises `UserError`."""

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

from ascendspeed.conversion.safe_pickle import safe_globals
from ascendspeed.utils import safetensors_header
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file, plain_file_name, read_json, read_json_object
from ascendspeed.utils.text import first_line

__all__ = ["checked_file", "load_pt", "load_safetensors", "read_index", "read_json", "read_json_object"]
AGAIN = "download or copy it again"
NOTHING: Mapping[str, type] = MappingProxyType({})


def load_safetensors(path: Path, root: Path | None = None) -> dict[str, Tensor]:
    """Loads every tensor of a safetensors file, memory-mapped; only the header is read at once.

    The library itself rejects a header that is too long or not JSON, unknown element types, and offsets that
    overlap, leave holes or do not end with the file. It accepts a duplicate name, which
    `safetensors_header.read` rejects. `root`: see `safe_io.checked`.
    """
    checked_file(path, root)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            safetensors_header.read(path)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (
        Exception
    ) as error:  # element types that the library knows and torch does not raise various exceptions
        _check_length(path)
        raise UserError(
            f"{path} is damaged or no safetensors file ({first_line(error, 200)}): {AGAIN}"
        ) from None


def _check_length(path: Path) -> None:
    """Raises `UserError` when a safetensors file is shorter than its header declares."""
    size, declared = path.stat().st_size, safetensors_header.declared_size(path)
    if declared and size < declared:
        raise UserError(f"{path} is cut off, it has {size} of {declared} bytes: {AGAIN}")


def load_pt(path: Path, root: Path | None = None, known: Mapping[str, type] = NOTHING) -> Any:
    """Loads a file of `torch.save`, memory-mapped. Only tensors and plain values are unpickled
    (`safe_pickle`): no code runs.

    Files from before torch 1.6 are read into memory, and only if they hold nothing else. `root`: see
    `safe_io.checked`; `known`: see `safe_pickle.safe_globals`.
    """
    checked_file(path, root)
    with open(path, "rb") as file:
        start = file.read(4)
    is_zip = start == b"PK\x03\x04"
    if not start or (is_zip and not _has_zip_end(path)):  # the directory of a zip is at its end
        raise UserError(f"{path} is cut off, {'its end is missing' if start else 'it is empty'}: {AGAIN}")
    try:
        if is_zip:
            _check_uncompressed(path)
        with (
            torch.serialization.safe_globals(safe_globals(path, known) if is_zip else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # on a pickle protocol that other programs write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle may raise any exception
        raise UserError(
            f"{path} is damaged ({AGAIN}), or holds more than tensors (then it is not loaded: it could run "
            f"code): {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """The reason of a refusal, without torch's advice to load the file anyway."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return f"{refused[1]} is not plain data" if refused else inner[1] if inner else first_line(error, 200)


def _has_zip_end(path: Path) -> bool:
    """True if the directory at the end of a zip exists, damaged or not."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _check_uncompressed(path: Path) -> None:
    """Raises `ValueError` if a record is compressed: torch.save never does that, and a small file could fill
    the memory.
    """
    with zipfile.ZipFile(path) as archive:
        compressed = [
            info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED
        ]
    if compressed:
        raise ValueError(f"{compressed[0]!r} in it is compressed, which torch.save does not do")


def read_index(path: Path, root: Path | None = None) -> dict[str, str]:
    """Reads `model.safetensors.index.json`: tensor -> file in the same folder. Raises `UserError`, also if a
    file is missing.
    """
    weight_map = read_json_object(path, root).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map of names and files: {AGAIN}")
    for file in sorted({plain_file_name(file, path) for file in weight_map.values()}):
        if not (path.parent / file).is_file():
            raise UserError(f"{path.parent} lacks {file}, which {path.name} names: {AGAIN}")
    return weight_map
