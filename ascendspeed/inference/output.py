"""Writes answers to stdout, or to a file of JSON lines that appears whole or not at all."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

from ascendspeed.inference.args import check_output_file, partial_of
from ascendspeed.utils import streams
from ascendspeed.utils.atomic import open_atomic, open_locked
from ascendspeed.utils.errors import UserError

EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
"""Exit code when the reader of stdout has closed the pipe: 141, as for other programs of a shell."""

RecordKey = tuple[int, int]
"""(number of the task, number of the prompt)."""


class AnswerWriter:
    """Accepts records in any order and writes them in the order of the prompts.

    On stdout a record appears as soon as all before it have. With a file, NAME.partial receives every record
    at once, and NAME appears when all of them are complete. NAME.partial is locked: a second process with
    the same NAME is refused.
    """

    def __init__(self, path: str | None, is_writer: bool) -> None:
        """`is_writer`: whether this rank writes; other ranks ignore all calls."""
        self._path = Path(path) if path else None
        self._partial = partial_of(self._path) if self._path else None
        self._is_writer = is_writer
        self._file: IO[bytes] | None = None
        self._lines: dict[RecordKey, str] = {}
        self._pending: dict[RecordKey, str] = {}
        self._next: RecordKey = (0, 0)
        if is_writer and self._path:
            self._file = self._open()

    def add(self, key: RecordKey, record: dict[str, Any], text: str | None) -> None:
        """Adds a record; `text`: its form on stdout, None if it has been streamed.

        Raises `UserError` if writing fails.
        """
        if not self._is_writer:
            return
        if self._file is None:
            if text is not None:
                self._print(key, text)
            return
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self._lines[key] = line
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._partial} cannot be written: {error.strerror}; the answers so far are in it"
            ) from None

    def task_done(self, task: int) -> None:
        """Declares that no more records of this task follow."""
        self._next = (task + 1, 0)

    def finish(self) -> None:
        """Writes the sorted file under its name and deletes the partial one. Raises `UserError`."""
        if self._file is None:
            return
        try:
            with self._file, open_atomic(self._path, shared=True) as file:
                file.writelines(self._lines[key].encode() for key in sorted(self._lines))
                if self._path.exists():
                    raise FileExistsError(None, "another program has written it meanwhile")
            self._partial.unlink()
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; the answers are in {self._partial}"
            ) from None

    def _open(self) -> IO[bytes]:
        """Opens and locks NAME.partial. Raises `UserError` if it is another run's, or NAME exists by now."""
        try:
            file = open_locked(self._partial)
        except OSError as error:
            raise UserError(f"{self._partial} cannot be written: {error.strerror}") from None
        if file is None:
            raise UserError(
                f"another process is writing {self._partial}: wait for it, or give --output another name"
            )
        try:
            check_output_file(self._path)  # again: another run may have ended since the command line was read
        except UserError:
            if not os.fstat(file.fileno()).st_size:
                self._partial.unlink()
            file.close()
            raise
        return file

    def _print(self, key: RecordKey, text: str) -> None:
        self._pending[key] = text
        while self._next in self._pending:
            write_stdout(self._pending.pop(self._next) + "\n")
            task, prompt = self._next
            self._next = (task, prompt + 1)


def write_stdout(text: str) -> None:
    """Writes to stdout at once, in UTF-8 whatever the locale. Exits if the pipe is closed (`| head -1`)."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()
        streams.raise_loss()
    except OSError as error:
        streams.discard(1, error)
        if isinstance(error, BrokenPipeError):
            sys.exit(EXIT_BROKEN_PIPE)
        raise UserError(f"stdout cannot be written: {error.strerror}; give --output") from None
