"""Finds the files of a Hugging Face dataset on disk."""

import re
from collections.abc import Sequence
from pathlib import Path

from ascendspeed.data.readers import random_access
from ascendspeed.utils.errors import UserError

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt")
SPLIT_WORDS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval",
}
"""Split -> words in file names that stand for it."""


def find_files(path: str) -> list[Path]:
    """Returns the files that a path names: a file, a glob, or a folder; empty if it holds no such data.

    Raises `UserError` for a folder with several splits.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _of_one_suffix(_named_files(path))
    if all((folder / name).is_file() for name in random_access.SAVED_FILES):
        return sorted(folder.glob("*.arrow"))
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(p for p in folder.iterdir() if (p / random_access.SAVED_FILES[0]).is_file())
        if len(parts) != 1:
            raise UserError(
                f"{path} holds several data sets; name one of them: "
                f"{', '.join(map(str, parts)) or 'there is none'}"
            )
        return sorted(parts[0].glob("*.arrow"))
    files = _of_one_suffix(sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."))
    splits = {_split_of(file.relative_to(folder)): file for file in reversed(files)}
    splits.pop("", None)
    if len(splits) > 1:
        example = next(iter(splits.values()))
        raise UserError(
            f"{path} holds several splits, {', '.join(sorted(splits))}: name the files of one, such as "
            f"'{example}'"
        )
    return files


def _named_files(path: str) -> list[Path]:
    """Files of a path that is no folder: the file itself, or the matches of a glob."""
    file = Path(path)
    if file.is_file():
        return [file]
    return sorted(file.parent.glob(file.name)) if set(path) & set("*?[") else []


def _of_one_suffix(files: Sequence[Path]) -> list[Path]:
    """Files with the first of `SUFFIXES` that occurs, without the hub's metadata."""
    data = [file for file in files if not file.name.startswith("dataset_info")]
    for suffix in SUFFIXES:
        matching = [file for file in data if file.suffix == suffix]
        if matching:
            return matching
    return []


def _split_of(file: Path) -> str:
    """Split that a file name indicates; empty if none."""
    words = set(re.split(r"[^a-z]+", str(file).lower()))
    return next((split for split, names in SPLIT_WORDS.items() if words & set(names.split())), "")
