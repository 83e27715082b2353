"""Registry of file readers: rows of parquet, json, jsonl, csv and txt files in shards that processes read in
parallel.

A file is split into shards of about `SHARD_BYTES` of text by its content alone, so the split is the same for
any number of processes. If a format allows random access, a shard is a range of the file, and the process
that works on it reads the rows; otherwise the file is read in order and the shards carry their rows. Memory
is bounded by a few shards in both cases. A new format is a `FileReader` in a file of its own and a line in
`READERS`.
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
    """Finds the files that paths, globs and folders name (of a folder all known files below, sorted).

    Raises `UserError` if one of them names no file, or a file of an unknown type.
    """
    found: list[Path] = []
    for name in map(str, inputs):
        if Path(name).is_dir():
            files = sorted(path for path in Path(name).rglob("*") if _is_data(path))
        else:
            names = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
            files = [path for path in map(Path, names) if path.is_file()]
        if not files:
            raise UserError(
                f"--input {name}: there is no such file or folder, or it holds no {', '.join(READERS)}"
            )
        found.extend(files)
    for path in found:
        _reader(path)
    return found


def _is_data(path: Path) -> bool:
    return path.is_file() and _suffix(path) in READERS and path.name[0] not in "._"


def columns(path: Path) -> list[str]:
    """Returns the column names of a file (of jsonl and json the keys of the first thousand rows); empty
    without rows."""
    return _reader(path).columns(path)


def shards(path: Path, needed: Sequence[str]) -> Iterator[Shard]:
    """Yields the shards of a file in order; `needed` are the columns that will be read."""
    return _reader(path).shards(path, needed)


def read(shard: Shard, needed: Sequence[str]) -> Iterator[RowBatch]:
    """Yields the rows of a shard in batches with exactly the columns `needed`."""
    return _reader(shard.path).read(shard, needed)


def describe_location(path: Path, location: int) -> str:
    """Describes the location of a row, such as `line 7`."""
    return _reader(path).describe_location(path, location)


def _suffix(path: Path) -> str:
    """Returns the suffix in lower case; `.jsonl.gz` counts as one."""
    name = Path(path.name.lower())
    return "".join(name.suffixes[-2:]) if name.suffix == ".gz" else name.suffix


def _reader(path: Path) -> FileReader:
    suffix = _suffix(path)
    if suffix not in READERS:
        raise UserError(
            f"{path}: files of type {suffix or 'no suffix'} cannot be read; there are: {', '.join(READERS)}"
        )
    return READERS[suffix]
