"""Files that appear whole or not at all."""

import os
from pathlib import Path

from ascendspeed.utils.errors import UserError


def put(path: Path, content: str | bytes) -> None:
    """Writes under another name, fsyncs, renames. Raises `UserError` when it cannot."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def remove(path: Path) -> None:
    """Deletes a file, if it is there. Raises `UserError` when it cannot."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
