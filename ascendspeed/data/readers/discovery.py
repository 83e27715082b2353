"""Finds the files that a path, a glob or a folder names: nothing is passed over without a note, and nothing
that cannot be reached without an error."""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

CACHE_FOLDER = "index-cache"
"""Folder that training makes beside data; what it holds is no data."""
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files of the Hugging Face hub and of `save_to_disk` that describe data."""
SAVED_STATE = "state.json"
"""One more, beside a `dataset_info.json`."""
SPLIT_WORDS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval",
}
"""Split -> words in file names that stand for it."""


@dataclass
class FoundFiles:
    """Files that one path names, sorted, and notes about what is not read or is mixed."""

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_files(name: str, type_of: Callable[[Path], str]) -> FoundFiles:
    """Finds the data files of a path, a glob, or a folder (at any depth, behind links too, without hidden
    files and folders).

    `type_of`: (path) -> type of a data file, such as `.jsonl`; empty if it is none. A glob and a path give
    files of any type, a folder only data files. Raises `UserError` for what cannot be reached, and for a
    folder with several splits.
    """
    if not name:
        raise UserError("an empty path names no data")
    kind = file_kind(Path(name))
    if kind == "folder":
        return _files_below(Path(name), type_of)
    if kind == "file":
        return FoundFiles([Path(name)])
    return _matches(name) if glob.has_magic(name) else FoundFiles()


def file_kind(path: Path) -> str:
    """Returns `file`, `folder`, `other` (a device, a pipe), or an empty string if there is nothing.

    Raises `UserError` if it cannot be reached, or is a link that leads nowhere.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        return ""
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def unreadable(path: object, error: Exception) -> UserError:
    """Builds the error for a file or folder that cannot be read."""
    return UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def walk(folder: Path) -> Iterator[Path]:
    """Yields everything below a folder that is no folder, in sorted order within each; follows links, visits
    every folder once, and hidden ones not at all.

    Raises `UserError` for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be read: {error.strerror}; make it readable, or name the files to read"
        )

    if folder.resolve() == Path("/"):
        raise UserError(f"{folder} is the root of the file system: name the folder of the data")
    visited = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        yield from (Path(root, name) for name in sorted(files))


def _files_below(folder: Path, type_of: Callable[[Path], str]) -> FoundFiles:
    files: list[Path] = []
    others: list[Path] = []
    for path in sorted(walk(folder)):
        relative = path.relative_to(folder)
        if CACHE_FOLDER in relative.parts[:-1] or (path.name[0] == "." and not type_of(path)):
            continue
        is_data = type_of(path) and not _is_metadata(path) and path.name[0] not in "._"
        (files if file_kind(path) == "file" and is_data else others).append(relative)
    splits = _splits(files)
    if len(splits) > 1:
        raise UserError(
            f"{folder} holds several splits, {', '.join(sorted(splits))}: name the files of one, such as "
            f"'{folder / next(iter(splits.values()))}'"
        )
    found = FoundFiles([folder / file for file in files])
    if others:
        verb = "file is" if len(others) == 1 else "files are"
        found.notes.append(f"{folder}: {len(others):,} {verb} not read: {shorten_list(others)}")
    return found


def _matches(pattern: str) -> FoundFiles:
    """Returns the files that a glob matches."""
    for parent in Path(pattern).parents:
        for folder in glob.glob(str(parent), recursive=True):
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                raise UserError(f"{folder} cannot be read: no permission")
    found = FoundFiles()
    others = []
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if file_kind(path) == "file":
            found.files.append(path)
        elif "**" not in pattern:  # which matches every folder on the way
            others.append(path)
    if others:
        found.notes.append(f"{pattern}: not read, because they are no files: {shorten_list(others)}")
    fixed = _fixed_folder(pattern)
    splits = _splits(path.relative_to(fixed) for path in found.files)
    if len(splits) > 1:
        found.notes.append(f"{pattern}: files of several splits are read: {', '.join(sorted(splits))}")
    return found


def _fixed_folder(pattern: str) -> Path:
    """Returns the folder of a glob up to its first wildcard."""
    return next(parent for parent in Path(pattern).parents if not glob.has_magic(str(parent)))


def _is_metadata(path: Path) -> bool:
    saved = path.name == SAVED_STATE and (path.parent / METADATA[0]).is_file()
    return saved or path.name in METADATA


def _splits(files: Iterable[Path]) -> dict[str, Path]:
    """Splits that the names of files, relative to a folder, indicate, each with its first file."""
    splits: dict[str, Path] = {}
    for file in files:
        words = set(re.split(r"[^a-z]+", str(file).lower()))
        for split, names in SPLIT_WORDS.items():
            if words & set(names.split()):
                splits.setdefault(split, file)
                break
    return splits


def count_types(files: Iterable[Path], type_of: Callable[[Path], str]) -> str:
    """Returns `2 .jsonl and 1 .txt` for files of several types; empty for files of one type."""
    counts = Counter(map(type_of, files))
    parts = [f"{count} {name}" for name, count in sorted(counts.items())]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else ""


def refuse_repeated(files: Sequence[Path]) -> None:
    """Raises `UserError` if two of the paths are the same file, by its name or by a link."""
    first: dict[str, Path] = {}
    for path in files:
        earlier = first.setdefault(os.path.realpath(path), path)
        if earlier is not path:
            same = f"{path} is named twice" if earlier == path else f"{earlier} and {path} are the same file"
            raise UserError(f"{same}: its rows would be read twice; name it once")
