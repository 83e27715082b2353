"""Answers on stdout and in a file of JSON lines, which appears whole or not at all."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from ascendspeed.inference.args import partial_of
from ascendspeed.utils.atomic import open_atomic
from ascendspeed.utils.errors import UserError

EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
"""Exit code of a program whose answers nobody reads: 141, as every program of a shell."""


class AnswerWriter:
    """Takes records in any order. In a file they stand in that of the prompts; on stdout they are shown in it, as far as they go.

    While the command runs, the file is NAME.partial, a line for each answer as it comes; NAME is there when all of them are.
    """

    def __init__(self, path: str | None, speaks: bool) -> None:
        """`speaks`: whether this rank writes at all."""
        self._path = Path(path) if path else None
        self._partial = partial_of(self._path) if self._path else None
        self._speaks, self._file = speaks, None
        self._lines: dict[tuple[int, int], str] = {}
        self._waiting: dict[tuple[int, int], str] = {}
        self._next = (0, 0)
        if speaks and self._path:
            self._file = self._open()

    def add(self, place: tuple[int, int], record: dict[str, Any], shown: str | None) -> None:
        """`place`: number of the task and of the prompt; `shown`: for stdout, None where it has been streamed.

        Raises `UserError` when the file cannot be written.
        """
        if not self._speaks:
            return
        if self._file is None:
            if shown is not None:
                self._show(place, shown)
            return
        self._lines[place] = line = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._partial} cannot be written: {error.strerror}; what is there so far is kept"
            ) from None

    def task_done(self, task: int) -> None:
        """No more records of this task follow."""
        self._next = (task + 1, 0)

    def finish(self) -> None:
        """Gives the file its name. Raises `UserError`."""
        if self._file is None:
            return
        try:
            self._file.close()
            with open_atomic(self._path, shared=True) as file:
                file.writelines(self._lines[place].encode() for place in sorted(self._lines))
            self._partial.unlink()
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; the answers are in {self._partial}"
            ) from None

    def _open(self) -> TextIO:
        try:
            return open(self._partial, "a", encoding="utf-8")  # what another run has left there is never lost
        except OSError as error:
            raise UserError(f"{self._partial} cannot be written: {error.strerror}") from None

    def _show(self, place: tuple[int, int], shown: str) -> None:
        self._waiting[place] = shown
        while self._next in self._waiting:
            write_stdout(self._waiting.pop(self._next) + "\n")
            self._next = (self._next[0], self._next[1] + 1)


def write_stdout(text: str) -> None:
    """To stdout, at once, in UTF-8 whatever the locale. Where nobody reads it any more (`| head -1`) this ends the program."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python would fail once more as it ends
        sys.exit(EXIT_BROKEN_PIPE)
