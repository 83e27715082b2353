"""What the model has answered, kept as it comes: a killed evaluation goes on where it was."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json

NAME = "questions.jsonl"
BLOCK, SECONDS = 64, 5.0
"""Answers are on the disk after so many of them, or so long."""
Record = dict[str, Any]


def key_of(*parts: Any) -> str:
    """A name for everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def open_together(folder: Path, settings: Record, grid: Any) -> "Answers":
    """Rank 0 keeps the file; all know what it holds, or why it cannot be used. Raises `UserError` on every rank alike."""
    opened, fault = None, None
    if grid.rank == 0:
        try:
            opened = Answers(folder, settings)
        except UserError as error:
            fault = str(error)
    fault, known = grid.all_gather_object((fault, opened.known if opened else {}))[0]
    if fault:
        raise UserError(fault)
    if opened is None:
        opened = Answers(None, settings)
        opened.known = known
    return opened


class Answers:
    """Key of a question -> what was answered. The first line of the file holds the settings of the run, every other an answer."""

    def __init__(self, folder: Path | None, settings: Record) -> None:
        """Opens or makes the file in `folder`; None: in memory only.

        Raises `UserError` when it holds the answers of another model or of other settings, or is damaged. A last line that
        a kill has cut off is dropped.
        """
        self.settings, self.known = settings, {}
        self._file, self._waiting, self._last = None, 0, time.monotonic()
        if folder is None:
            return
        path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            whole = self._read(path) if path.exists() else 0
            self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - lives as long as this
            self._file.truncate(whole)
            self._file.seek(whole)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror}; choose another --output-dir"
            ) from None
        if not whole:
            self._write({"settings": settings})
            self.flush()

    def _read(self, path: Path) -> int:
        """Reads what is there; returns the bytes of whole lines."""
        whole = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = parse_json(line)
                    if number == 1:
                        self._compare(path, record["settings"])
                    else:
                        self.known[record["key"]] = record
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{path}:{number}: this is no answer of an evaluation; delete the file, or choose another --output-dir"
                    ) from None
                whole += len(line)
        return whole

    def _compare(self, path: Path, found: Record) -> None:
        for name in {**self.settings, **found}:
            then, now = found.get(name), self.settings.get(name)
            if then != now:
                raise UserError(
                    f"{path} holds answers of {name} {then}, and this is {now}: "
                    "choose another --output-dir, or delete the folder to start anew"
                )

    def put(self, record: Record) -> None:
        """Keeps an answer under its `key`."""
        self.known[record["key"]] = record
        if self._file is None:
            return
        self._write(record)
        self._waiting += 1
        if self._waiting >= BLOCK or time.monotonic() - self._last > SECONDS:
            self.flush()

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def flush(self) -> None:
        """Waits until all of it is on the disk. Raises `UserError`."""
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written: {error.strerror}") from None
        self._waiting, self._last = 0, time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        if self._file is not None:
            self._file.close()
        self._file = None
