"""Registry of file readers: rows of parquet, json, csv and txt files in shards that processes read in
parallel.

A file is split into shards of about `SHARD_BYTES` of text by its content alone, so the split is the same for
any number of processes. If a format allows random access, a shard is a range of the file, and the process
that works on it reads the rows; otherwise the file is read in order and the shards carry their rows. Memory
is bounded by a few shards in both cases. A new format is a `FileReader` in a file of its own and a line in
`READERS`.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ascendspeed.data.readers import discovery
from ascendspeed.data.readers.compression import COMPRESSIONS, DAMAGED, compression_of, open_text, read_head
from ascendspeed.data.readers.json_text import Layout
from ascendspeed.data.readers.lines import CHUNK, TXT
from ascendspeed.data.readers.parquet import PARQUET
from ascendspeed.data.readers.sequential import COMPRESSED_TXT, CSV, JSON, TSV, json_layout
from ascendspeed.data.readers.shard import FileReader, RowBatch, Shard
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import refuse_carriage_returns
from ascendspeed.utils.text import first_line

logger = logging.getLogger(__name__)

TEXT_READERS = {".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".csv": CSV, ".tsv": TSV, ".txt": TXT}
WITH_HEADER = (".parquet", ".csv", ".tsv")
"""Formats that name their columns once, before the rows."""
READERS: dict[str, FileReader] = {
    ".parquet": PARQUET,
    **TEXT_READERS,
    **{
        suffix + compression: COMPRESSED_TXT if reader is TXT else reader
        for suffix, reader in TEXT_READERS.items()
        for compression in COMPRESSIONS
    },
}


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Finds the files that paths, globs and folders name (of a folder all known files below, sorted), and
    logs what is not read.

    Raises `UserError` if one of them names no file, a file that cannot be read, or one that is also named by
    another.
    """
    files: list[Path] = []
    for name in map(str, inputs):
        found = discovery.find_files(name, type_of)
        if not found.files:
            detail = f": {'; '.join(found.notes)}" if found.notes else ""
            raise UserError(
                f"--input {name}: there is no such file or folder, or it holds no {describe_types()}{detail}"
            )
        for note in found.notes:
            logger.info(f"note: {note}")
        files.extend(found.files)
    if not files:
        raise UserError("--input names no file; give files, quoted globs or folders")
    for path in files:
        check_file(path)
    discovery.refuse_repeated(files)
    types = discovery.count_types(files, type_of)
    if types:
        logger.info(f"note: files of several types are read: {types}")
    return files


def check_file(path: Path) -> None:
    """Raises `UserError` for a file of an unknown type, one that cannot be read, a Git LFS pointer, UTF-16,
    and lines that end with carriage returns alone."""
    reader = reader_of(path)
    try:
        head = read_head(path, is_text=format_of(path) in TEXT_READERS)
        has_lines = format_of(path) == ".txt" or (reader is JSON and json_layout(path) is Layout.LINES)
        if has_lines and b"\n" not in head:
            with open_text(path) as (file, _):
                refuse_carriage_returns(path, iter(partial(file.read, CHUNK), b""))
    except PermissionError as error:
        raise discovery.unreadable(path, error) from error
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error


def columns(path: Path) -> list[str]:
    """Returns the column names of a file (of jsonl and json the keys of the first thousand rows); empty
    without rows."""
    return reader_of(path).columns(path)


def shards(path: Path, needed: Sequence[str]) -> Iterator[Shard]:
    """Yields the shards of a file in order; `needed` are the columns that will be read."""
    return reader_of(path).shards(path, needed)


def read(shard: Shard, needed: Sequence[str]) -> Iterator[RowBatch]:
    """Yields the rows of a shard in batches with exactly the columns `needed`."""
    return reader_of(shard.path).read(shard, needed)


def describe_location(path: Path, location: int) -> str:
    """Describes the location of a row, such as `line 7`."""
    return reader_of(path).describe_location(path, location)


def type_of(path: Path) -> str:
    """Returns the suffix in lower case, `.jsonl.gz` counts as one; empty if no reader has it."""
    suffix = _suffix(path)
    return suffix if suffix in READERS else ""


def format_of(path: Path) -> str:
    """Returns the suffix of the format, in lower case, without that of a compression."""
    return _suffix(path).removesuffix(compression_of(path))


def describe_types() -> str:
    """Lists what can be read, for messages."""
    plain = [suffix for suffix in READERS if not compression_of(Path(f"x{suffix}"))]
    return f"{', '.join(plain)}, all but .parquet also with {', '.join(COMPRESSIONS)}"


def reader_of(path: Path) -> FileReader:
    """Returns the reader of a file. Raises `UserError` if there is none."""
    suffix = _suffix(path)
    if suffix in READERS:
        return READERS[suffix]
    if suffix in COMPRESSIONS:
        raise UserError(f"{path}: its name must have the type of the content too, such as .jsonl{suffix}")
    kind = f"files of type {suffix}" if suffix else "files without a suffix"
    raise UserError(f"{path}: {kind} cannot be read; there are: {describe_types()}")


def _suffix(path: Path) -> str:
    name = Path(path.name.lower())
    return "".join(name.suffixes[-2:]) if compression_of(name) else name.suffix
