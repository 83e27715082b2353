"""Answers of the model on disk, appended as they arrive, so that a killed evaluation continues where it
stopped.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ascendspeed.utils.atomic import open_locked, sync_file
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json
from ascendspeed.utils.text import shorten, shorten_list

logger = logging.getLogger(__name__)

OTHER_FOLDER = "choose another --output (OUTPUT= of a recipe)"
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


def _shown(value: Any) -> str:
    """Returns a setting for an error message."""
    text = str(value)
    return text if len(text) <= 80 and text.isprintable() else shorten(text)


class AnswerCache:
    """Answers by the key of their question.

    The first line of the file has the settings of the run, each other one an answer. The file is locked
    until `close`: a second evaluation with the same folder is refused.
    """

    def __init__(self, folder: Path | None, settings: AnswerRecord) -> None:
        """Opens or creates the file in `folder`; None: in memory only.

        A last line that a kill has cut off is dropped, and damaged lines are skipped with a note: their
        questions are answered again.

        Raises UserError if the file has answers of another model or of other settings, has no settings, or
        another process is writing it.
        """
        self.settings = settings
        self.records: dict[str, AnswerRecord] = {}
        self._file: IO[bytes] | None = None
        self._unflushed, self._flushed_at = 0, time.monotonic()
        if folder is None:
            return
        self._path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(self._path)
            if self._file is None:
                raise UserError(f"another evaluation is writing {self._path}: wait for it, or {OTHER_FOLDER}")
            size = self._read(self._file)
            self._file.truncate(size)
            self._file.seek(size)
            if not size:
                self._write({"settings": settings})
                self.flush()
        except (OSError, UserError) as error:
            if self._file is not None:
                self._file.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self._path}: cannot be written: {error.strerror}; {OTHER_FOLDER}") from None

    @property
    def is_on_disk(self) -> bool:
        """True if answers are kept in a file."""
        return self._file is not None

    def _read(self, file: IO[bytes]) -> int:
        """Reads the records and returns the number of bytes of complete lines."""
        size = 0
        damaged = []
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = parse_json(line)
                if number == 1:
                    self._check_settings(self._path, record["settings"])
                elif isinstance(record["key"], str):
                    self.records[record["key"]] = record
                else:
                    damaged.append(number)
            except (ValueError, KeyError, TypeError):
                if number == 1:
                    raise UserError(
                        f"{self._path}:1: this line does not hold the settings of an evaluation; delete the "
                        f"file, or {OTHER_FOLDER}"
                    ) from None
                damaged.append(number)
            size += len(line)
        if damaged:
            logger.info(
                f"note: {self._path}: {len(damaged)} damaged lines are not used (line "
                f"{shorten_list(damaged)}); their questions are answered again"
            )
        return size

    def discard(self, is_damaged: Callable[[AnswerRecord], bool]) -> None:
        """Removes the records that do not have the content of an answer, with a note."""
        keys = [key for key, record in self.records.items() if is_damaged(record)]
        for key in keys:
            del self.records[key]
        if keys:
            logger.info(
                f"note: {len(keys)} records of {FILE_NAME} are no complete answers (key "
                f"{shorten_list(keys, 3)}); their questions are answered again"
            )

    def _check_settings(self, path: Path, previous: AnswerRecord) -> None:
        for name in {**self.settings, **previous}:
            if previous.get(name) != self.settings.get(name):
                raise UserError(
                    f"{path} holds answers of {name} {_shown(previous.get(name))}, this run has "
                    f"{self.settings.get(name)}: {OTHER_FOLDER}, or delete the folder to start over"
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
            sync_file(self._file)
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written: {error.strerror}") from None
        self._unflushed, self._flushed_at = 0, time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file, and releases its lock."""
        self.flush()
        if self._file is not None:
            self._file.close()
        self._file = None
