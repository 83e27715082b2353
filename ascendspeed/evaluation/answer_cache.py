"""Answers of the model on disk, appended as they arrive, so that a killed evaluation continues where it
stopped.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json

FILE_NAME = "questions.jsonl"
FLUSH_ANSWERS, FLUSH_SECONDS = 64, 5.0
"""Answers are flushed to disk after this many, or after this time."""
AnswerRecord = dict[str, Any]


def answer_key(*parts: Any) -> str:
    """Returns a hash of everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def open_on_all_ranks(folder: Path, settings: AnswerRecord, grid: Any) -> "AnswerCache":
    """Opens the file on rank 0 and sends its records to all ranks.

    Raises the same UserError on every rank.
    """
    cache, fault = None, None
    if grid.rank == 0:
        try:
            cache = AnswerCache(folder, settings)
        except UserError as error:
            fault = str(error)
    fault, records = grid.all_gather_object((fault, cache.records if cache else {}))[0]
    if fault:
        raise UserError(fault)
    if cache is None:
        cache = AnswerCache(None, settings)
        cache.records = records
    return cache


class AnswerCache:
    """Answers by the key of their question.

    The first line of the file has the settings of the run, each other one an answer.
    """

    def __init__(self, folder: Path | None, settings: AnswerRecord) -> None:
        """Opens or creates the file in `folder`; None: in memory only.

        A last line that a kill has cut off is dropped.

        Raises UserError if the file has answers of another model or of other settings, or is damaged.
        """
        self.settings = settings
        self.records: dict[str, AnswerRecord] = {}
        self._file, self._unflushed, self._flushed_at = None, 0, time.monotonic()
        if folder is None:
            return
        path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            size = self._read(path) if path.exists() else 0
            self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed by close()
            self._file.truncate(size)
            self._file.seek(size)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror}; choose another --output-dir"
            ) from None
        if not size:
            self._write({"settings": settings})
            self.flush()

    def _read(self, path: Path) -> int:
        """Reads the records and returns the number of bytes of complete lines."""
        size = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = parse_json(line)
                    if number == 1:
                        self._check_settings(path, record["settings"])
                    else:
                        self.records[record["key"]] = record
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{path}:{number}: this line is not an answer of an evaluation; delete the file, or "
                        "choose another --output-dir"
                    ) from None
                size += len(line)
        return size

    def _check_settings(self, path: Path, previous: AnswerRecord) -> None:
        for name in {**self.settings, **previous}:
            if previous.get(name) != self.settings.get(name):
                raise UserError(
                    f"{path} holds answers of {name} {previous.get(name)}, this run has "
                    f"{self.settings.get(name)}: choose another --output-dir, or delete the folder to start "
                    "over"
                )

    def put(self, record: AnswerRecord) -> None:
        """Stores an answer under its `key`."""
        self.records[record["key"]] = record
        if self._file is None:
            return
        self._write(record)
        self._unflushed += 1
        if self._unflushed >= FLUSH_ANSWERS or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def _write(self, record: AnswerRecord) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def flush(self) -> None:
        """Writes all answers to disk (fsync). Raises UserError."""
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written: {error.strerror}") from None
        self._unflushed, self._flushed_at = 0, time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
        self._file = None
