"""Copies rows of files that can only be read from their beginning (csv, JSON arrays, compressed files) to
lines in a cache, where they can be read in any order: the rows are those that preprocessing reads."""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ascendspeed.data.readers import registry
from ascendspeed.data.readers.shard import InvalidValue
from ascendspeed.utils.atomic import open_atomic
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

SUFFIX = ".rows"
"""Suffix of a cached file: no reader has it."""
VERSION = 2
"""Changes when readers give other rows for the same file."""


def cached_rows(path: Path, cache: Path) -> Path | None:
    """Returns the file of a path's rows in `cache`, which is written unless it exists; None for a file that
    can be read in place.

    Processes may call this at the same time: one writes, the others wait. Raises `UserError` if the file is
    damaged or the cache cannot be written.
    """
    rows = registry.reader_of(path).rows(path)
    if rows is None:
        return None
    stat = path.stat()
    key = [VERSION, str(path.absolute()), stat.st_size, stat.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    target = cache / f"{path.name[:200]}-{digest}{SUFFIX}"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache):
            if not target.is_file():
                logger.info(f"{path}: its rows are copied to {target}, to be read in any order")
                with open_atomic(target, shared=True) as file:
                    for location, row, _ in rows:
                        file.write(_encode(location, row))
    except OSError as error:
        raise UserError(
            f"{error.filename or cache}: the rows of {path} cannot be copied there: {error.strerror}; give "
            "another --data-cache-path"
        ) from error
    return target


def parse(line: bytes) -> Any:
    """Returns the row of a cached line."""
    _, row, *fault = json.loads(line)
    return InvalidValue(*fault) if fault else row


def location(line: bytes) -> int:
    """Returns the location of a cached line's row in the original file, as its reader defines it."""
    return json.loads(line)[0]


def _encode(location: int, row: Any) -> bytes:
    fields = [location, None, row.kind, row.detail] if isinstance(row, InvalidValue) else [location, row]
    return f"{json.dumps(fields)}\n".encode()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock of the folder; on a file system without locks every process writes a file of its own."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
