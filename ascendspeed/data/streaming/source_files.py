"""Finds the files of a data set that is tokenized in training."""

import glob
from collections.abc import Sequence
from pathlib import Path

from ascendspeed.data.readers import discovery, random_access, registry
from ascendspeed.data.readers.discovery import FoundFiles
from ascendspeed.data.readers.random_access import ARROW
from ascendspeed.utils.errors import UserError

SAME_TYPE = {".ndjson": ".jsonl", ".json": ".jsonl"}
"""Types whose files may be read together."""
INDEXED = (".bin", ".idx", ".meta")
"""Files of indexed data, which are named by their prefix."""


def find_files(path: str) -> FoundFiles:
    """Finds the files that a path names: a file, a glob, or a folder; none if it holds no such data.

    Raises `UserError` for several splits or types, and for a file of an unknown type.
    """
    kind = discovery.file_kind(Path(path)) if path else ""
    saved = _saved_files(Path(path)) if kind == "folder" else None
    if saved is not None:
        return FoundFiles(saved)
    found = discovery.find_files(path, _type_of)
    if not found.files:
        _refuse_nothing(path, kind, found)
    for file in found.files:
        if not _type_of(file):
            _refuse_type(file)
    discovery.refuse_repeated(found.files)
    _check_types(path, found.files)
    return found


def check_files(files: Sequence[Path]) -> None:
    """Raises `UserError` for a file that cannot be read, a Git LFS pointer, and UTF-16."""
    for file in files:
        if _type_of(file) != ARROW:
            registry.check_file(file)


def _saved_files(folder: Path) -> list[Path] | None:
    """Returns the arrow files of a folder of `save_to_disk`; None for any other folder."""
    if all((folder / name).is_file() for name in random_access.SAVED_FILES):
        return sorted(folder.glob(f"*{ARROW}"))
    if not (folder / "dataset_dict.json").is_file():
        return None
    parts = sorted(p for p in folder.iterdir() if (p / random_access.SAVED_FILES[0]).is_file())
    if len(parts) != 1:
        raise UserError(
            f"{folder} holds several data sets; name one of them: "
            f"{', '.join(map(str, parts)) or 'there is none'}"
        )
    return sorted(parts[0].glob(f"*{ARROW}"))


def _type_of(file: Path) -> str:
    return ARROW if file.suffix.lower() == ARROW else registry.type_of(file)


def _format(file: Path) -> str:
    """Format of a file whatever its compression."""
    name = registry.format_of(file)
    return SAME_TYPE.get(name, name)


def _refuse_nothing(path: str, kind: str, found: FoundFiles) -> None:
    """Raises `UserError` if a path without files is not the prefix of indexed data."""
    if kind == "folder":
        detail = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise UserError(
            f"{path} holds no data{detail}: looked for {registry.describe_types()}, {ARROW}, and InternEvo's "
            ".bin with .bin.meta; indexed data are named by their prefix"
        )
    if _type_of(Path(path)) or glob.has_magic(path):
        raise UserError(f"{path}: there is no such file")


def _refuse_type(file: Path) -> None:
    """Raises `UserError` for a file that is no data set."""
    if file.suffix in INDEXED and file.with_suffix(".idx").is_file():
        raise UserError(f"{file}: indexed data are named by their prefix, {file.with_suffix('')}")
    if file.suffix == ".bin":
        raise UserError(
            f"{file}: there is neither {file.name}.meta (InternEvo's data) nor {file.stem}.idx (Megatron's) "
            "beside it"
        )
    registry.reader_of(file)


def _check_types(path: str, files: Sequence[Path]) -> None:
    """Raises `UserError` for files of several types: one of them would be passed over, or was not meant."""
    types = discovery.count_types(files, _format)
    if types:
        example = next(file for file in files if _format(file) != _format(files[0]))
        raise UserError(
            f"{path} holds files of several types, {types}: name those of one, by a quoted glob such as "
            f"'{example.parent}/*{_type_of(example)}', or make .bin/.idx of all by tools/preprocess_data.py"
        )
