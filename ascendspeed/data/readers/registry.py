"""Rows of parquet, json, jsonl, csv and txt files, one or many, in shards that processes work on side by side.

A file is cut into shards of about `SHARD_BYTES` of text by its content alone, so the cut is the same for any number of
processes. Where a format can be entered in the middle, a shard says where its rows lie and whoever works on it reads them;
elsewhere the file is read in order and the shards carry their rows. Memory is bounded by a few shards either way.
"""

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ascendspeed.data.readers.lines import JSONL, TXT
from ascendspeed.data.readers.parquet import PARQUET
from ascendspeed.data.readers.sequential import CSV, GZ_JSON, GZ_TEXT, JSON
from ascendspeed.data.readers.shard import FileReader, RowBatch, Shard
from ascendspeed.utils.errors import UserError

READERS: dict[str, FileReader] = {
    ".parquet": PARQUET,
    ".jsonl": JSONL,
    ".json": JSON,
    ".csv": CSV,
    ".txt": TXT,
    ".jsonl.gz": GZ_JSON,
    ".json.gz": GZ_JSON,
    ".csv.gz": CSV,
    ".txt.gz": GZ_TEXT,
}


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Files named by paths, globs and directories (every known file below, sorted). Raises `UserError` if one names nothing."""
    found: list[Path] = []
    for name in map(str, inputs):
        if Path(name).is_dir():
            files = sorted(
                p
                for p in Path(name).rglob("*")
                if p.is_file() and _suffix(p) in READERS and p.name[0] not in "._"
            )
        else:
            named = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
            files = [p for p in map(Path, named) if p.is_file()]
        if not files:
            raise UserError(
                f"--input {name}: there is no such file or folder, or it holds no {', '.join(READERS)}"
            )
        found.extend(files)
    for path in found:
        _format(path)
    return found


def columns(path: Path) -> list[str]:
    """Column names of a file (of jsonl and json: the keys of the first thousand rows); nothing for a file without rows."""
    return _format(path).columns(path)


def shards(path: Path, wanted: Sequence[str]) -> Iterator[Shard]:
    """The shards of a file, in order; `wanted` are the columns that will be read."""
    return _format(path).shards(path, wanted)


def read(shard: Shard, wanted: Sequence[str]) -> Iterator[RowBatch]:
    """The rows of a shard in batches with exactly the columns `wanted`."""
    return _format(shard.path).read(shard, wanted)


def describe_location(path: Path, place: int) -> str:
    """The place of a row of a file in words."""
    return _format(path).where(path, place)


def _suffix(path: Path) -> str:
    """Lower-case suffix; `.jsonl.gz` as one."""
    name = Path(path.name.lower())
    return "".join(name.suffixes[-2:]) if name.suffix == ".gz" else name.suffix


def _format(path: Path) -> FileReader:
    suffix = _suffix(path)
    if suffix not in READERS:
        raise UserError(
            f"{path}: files of type {suffix or 'no suffix'} cannot be read; there are: {', '.join(READERS)}"
        )
    return READERS[suffix]
