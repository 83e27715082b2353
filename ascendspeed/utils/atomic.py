"""Atomic writes: a file or folder appears whole or not at all, and stays after a power failure.

A file is written under a temporary name beside its own, flushed to the disk (fsync) and renamed; then its
folder is flushed, which makes the new name durable. A folder is filled under a hidden name and renamed when
it is complete.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ascendspeed.utils.errors import UserError

UNFINISHED = ".unfinished"
"""Marker file in the hidden folder of `staged_folder`: the folder may be cleared by the next writer."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk without space."""

logger = logging.getLogger(__name__)


def sync_file(file: IO[Any]) -> None:
    """Flushes everything that was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Flushes a closed file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_write_error(path: Path, error: OSError) -> str:
    """Reason for which a file or folder was not written; for a full disk also its free space."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            reason += f" ({free / 1e6:,.1f} MB are free in {path.parent})"
    return reason


def try_lock(file: int | IO[Any]) -> bool:
    """Locks an open file or folder until it is closed; returns False if another process holds the lock.

    On a file system without locks nothing is locked, and the result is True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def open_locked(path: Path) -> IO[bytes] | None:
    """Opens a file for reading and writing, or creates it, and locks it until it is closed.

    Returns None if another process holds the lock. Raises `OSError`.
    """
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 - the caller closes it
        if not try_lock(file):
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that held the lock has renamed or deleted it


# ---------------------------------------------------------------- files


@contextmanager
def open_atomic(path: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces `path` when the block ends without an exception. Raises
    `OSError`.

    `shared`: other processes may write the same path at the same time; each then has a temporary file of its
    own.
    """
    _refuse_device(path)
    temporary = _temporary(path, shared)
    try:
        with _create(temporary) as file:
            yield file
            sync_file(file)
        _rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def stage_file(path: Path, content: str | bytes) -> Callable[[], None]:
    """Writes a temporary file beside `path`; calling the result renames it, which needs no more disk space.

    Raises `OSError`.
    """
    _refuse_device(path)
    temporary = _temporary(path)
    with _create(temporary) as file:
        file.write(_encoded(content))
        sync_file(file)
    return lambda: _rename(temporary, path)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes or replaces a file; the folder must exist. Raises `OSError`."""
    with open_atomic(path) as file:
        file.write(_encoded(content))


def write_file(path: Path, content: str | bytes) -> None:
    """Writes or replaces a file and makes its folder. Raises `UserError` if the file cannot be written."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {describe_write_error(path, error)}") from error


def remove_file(path: Path) -> None:
    """Deletes a file if it exists. Raises `UserError` if it cannot be deleted."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be deleted: {error.strerror}") from error


def _refuse_device(path: Path) -> None:
    """Raises `OSError` for a device, pipe or socket, or a name in /dev such as /dev/stdout: the rename would
    put a file in its place, for all programs of the machine."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        if not is_file or path.parent.resolve() == Path(os.devnull).parent:
            raise OSError(errno.EINVAL, "it is a device or pipe, not a file", str(path))


def _temporary(path: Path, shared: bool = False) -> Path:
    writer = f".{os.uname().nodename}.{os.getpid()}" if shared else ""
    return path.with_name(f".{path.name}{writer}.tmp")


def _create(temporary: Path) -> IO[bytes]:
    """Creates a file anew: what a killed writer left, or a link that someone else put there, is removed."""
    temporary.unlink(missing_ok=True)
    return open(temporary, "xb")


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_path(path.parent)


# ---------------------------------------------------------------- folders


def publish_folder(draft: Path, target: Path) -> None:
    """Flushes a complete folder to the disk and renames it to `target`.

    Raises `OSError`, also if `target` holds files.
    """
    for path in draft.rglob("*"):
        sync_path(path)
    sync_path(draft)
    os.rename(draft, target)
    sync_path(target.parent)


def require_empty_dir(target: str | Path) -> Path:
    """Returns the absolute path of a folder to write. Raises `UserError` unless it is absent or empty.

    Commands call this before any work, so that a wrong target is reported at once.
    """
    target = Path(os.path.abspath(target))
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target} exists and is not an empty directory: remove it, or choose another")
    return target


def draft_of(target: Path) -> Path:
    """Returns the hidden folder that `staged_folder` fills."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def staged_folder(target: Path, needed: int = 0) -> Iterator[Path]:
    """Gives a hidden folder beside `target` to fill; it becomes `target` when the block ends, and is deleted
    on an exception.

    A killed writer leaves only the hidden folder, which the next one clears. Raises `UserError` when `target`
    is not empty, when another process is writing it, or when the disk has less than `needed` bytes free.
    """
    target = require_empty_dir(target)
    draft = draft_of(target)
    if draft.is_symlink() or (draft.exists() and not _may_clear(draft)):
        raise UserError(
            f"{draft} is in the way, and no conversion left it: move it away, or choose another target"
        )
    try:
        draft.mkdir(parents=True, exist_ok=True)
        lock = _lock(draft)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    try:
        _clear(draft)
        (draft / UNFINISHED).touch()
        free = shutil.disk_usage(draft).free
        if free < needed:
            raise UserError(
                f"{target} needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free"
            )
        yield draft
        (draft / UNFINISHED).unlink()
        publish_folder(draft, target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{target} cannot be written: {describe_write_error(target, error)}") from error
        raise
    finally:
        os.close(lock)


def _may_clear(draft: Path) -> bool:
    return draft.is_dir() and ((draft / UNFINISHED).exists() or not any(draft.iterdir()))


def _lock(draft: Path) -> int:
    """Descriptor of the folder, locked while it is open.

    Raises `UserError` if another process holds the lock.
    """
    lock = os.open(draft, os.O_RDONLY)
    try:
        # Another inode: the other writer has just finished, and renamed it.
        locked = try_lock(lock) and os.fstat(lock).st_ino == draft.stat().st_ino
    except FileNotFoundError:
        locked = False
    if not locked:
        os.close(lock)
        raise UserError(f"another process is writing {draft}: wait for it")
    return lock


def _clear(draft: Path) -> None:
    leftovers = list(draft.iterdir())
    if leftovers:
        logger.info("starting again: %s was left by a conversion that was stopped", draft)
    # The marker goes last: a writer that is killed here leaves a folder that may still be cleared.
    for path in sorted(leftovers, key=lambda path: path.name == UNFINISHED):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
