"""Rows -> `P_<key>_document.{bin,idx}`, by any number of processes, always the same bytes.

The input is cut into shards that do not depend on the number of processes; each is read, handled and tokenized by one process,
and the results are written in the order of the shards. No more shards are under way than a few per process, which bounds memory.
"""

import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed import tokenizer
from ascendspeed.data import rows
from ascendspeed.data.handlers import Document, Handler, check_columns, handler, screen
from ascendspeed.data.indexed import PairWriter, dtype_for
from ascendspeed.data.progress import Meter
from ascendspeed.data.shard import Shard
from ascendspeed.errors import UserError

LONGEST = 16 << 20
"""Bytes; a longer document is skipped as huge. One of this size takes a quarter of a minute and 600 MiB."""


@dataclass(frozen=True)
class Job:
    """What every process has to know; small and picklable."""

    tokenizer_path: str
    handler_name: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    longest: int = LONGEST


@dataclass
class Result:
    """What one shard makes under one key."""

    tokens: np.ndarray
    """Ids of all documents, one after the other, in the type of the .bin."""
    lengths: np.ndarray
    """Ids of each document, int32."""
    bytes: int = 0
    """Of the tokenized text, in UTF-8."""
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows that made no document, by what was wrong with them."""


@dataclass
class Output:
    """What all shards make under one key."""

    writer: PairWriter
    bytes: int = 0
    rows: int = 0
    highest: int = 0
    """Id."""
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        """The next shard's."""
        self.writer.add(result.tokens, result.lengths)
        self.bytes += result.bytes
        self.rows += result.rows
        self.highest = max(self.highest, int(result.tokens.max(initial=0)))
        self.skipped.update(result.skipped)

    def said(self) -> str:
        """One line for a person."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.skipped.items()))
        made = f"{self.writer.prefix}.bin, .idx: {self.writer.documents:,} documents, {self.writer.tokens:,} tokens"
        return f"{made} from {self.rows:,} rows, skipped: {kinds or 'none'}"

    def facts(self) -> dict[str, Any]:
        """Counts for P.meta; like all in it, they do not depend on when, where or by how many processes it was made."""
        return {
            "documents": self.writer.documents,
            "tokens": self.writer.tokens,
            "bytes": self.bytes,
            "rows": self.rows,
            "skipped": dict(sorted(self.skipped.items())),
            "max_token": self.highest,
        }


class Encoder:
    """Turns shards into results; one per process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = tokenizer.load(job.tokenizer_path)
        self.handler = handler(job.handler_name, job.json_keys)
        self.dtype = dtype_for(self.tokenizer.vocab_size)
        if job.append_eod and self.tokenizer.eos is None:
            raise UserError(f"--append-eod: the tokenizer in {job.tokenizer_path} names no eos_token")

    def encode(self, shard: Shard) -> dict[str, Result]:
        """Key -> what the rows of the shard make."""
        documents: dict[str, list[Document]] = {key: [] for key in self.handler.keys}
        results = {key: Result(np.zeros(0, self.dtype), np.zeros(0, np.int32)) for key in self.handler.keys}
        for batch in rows.read(shard, self.handler.columns):
            for key, values in self.handler.texts(batch).items():
                texts, size = screen(values, self.job.longest, results[key].skipped)
                made = [document for document in self._documents(texts) if len(document.tokens)]
                results[key].rows += len(values)
                results[key].bytes += size
                if len(made) < len(texts):
                    results[key].skipped["without tokens"] += len(texts) - len(made)
                documents[key].extend(made)
        for key, made in documents.items():
            self._pack(made, results[key])
        return results

    def facts(self) -> dict[str, Any]:
        """How the documents were made, for P.meta."""
        eod = self.tokenizer.eos if self.job.append_eod else None
        return {"vocab_size": self.tokenizer.vocab_size, "eod": eod, "handler": self.job.handler_name, "dtype": self.dtype.name}

    def _documents(self, texts: list[str]) -> Iterator[Document]:
        return map(Document, self.tokenizer.encode_batch(texts))

    def _pack(self, documents: Sequence[Document], into: Result) -> None:
        eod = np.array([self.tokenizer.eos] if self.job.append_eod else [], self.dtype)
        pieces = [piece for document in documents for piece in (document.tokens, eod)]
        if pieces:
            into.tokens = np.concatenate(pieces, dtype=self.dtype, casting="unsafe")
        into.lengths = np.array([len(document.tokens) + len(eod) for document in documents], np.int32)


_encoder: Encoder | None = None  # of this process, when it is one of the pool


def _begin(job: Job) -> None:
    """A process of the pool: ends with its parent, even one that is killed, instead of waiting for work for ever."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _encoder = Encoder(job)


def _encode(shard: Shard) -> dict[str, Result]:
    assert _encoder is not None
    return _encoder.encode(shard)


def _in_order(encoder: Encoder, shards: Iterator[tuple[Shard, float]], workers: int) -> Iterator[tuple[dict[str, Result], float]]:
    """(result, share of the input done) of every shard in order, made by `workers` processes."""
    if workers == 1:
        for shard, done in shards:
            yield encoder.encode(shard), done
        return
    # Started afresh, not forked: a fork of a process with threads (Arrow's) may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (encoder.job,))
    waiting: deque[tuple[Future[dict[str, Result]], float]] = deque()
    try:
        for shard, done in shards:
            waiting.append((pool.submit(_encode, shard), done))
            if len(waiting) >= 2 * workers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    except BrokenProcessPool as error:
        raise UserError("a worker process died, perhaps for want of memory; try fewer --workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _first(waiting: deque[tuple[Future[dict[str, Result]], float]]) -> tuple[dict[str, Result], float]:
    future, done = waiting.popleft()
    return future.result(), done


def _shards(files: Sequence[Path], made_by: Handler) -> Iterator[tuple[Shard, float]]:
    """Every shard, with the share of all bytes that lie in it and before it."""
    sizes = [path.stat().st_size for path in files]
    done = 0.0
    for path, size in zip(files, sizes, strict=True):
        for shard in rows.shards(path, made_by.columns):
            done += shard.weight * size / max(1, sum(sizes))
            yield shard, min(done, 1.0)


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str,
    job: Job,
    workers: int = 1,
    log_interval: int = 1000,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Writes `<prefix>_<key>_document.{bin,idx,meta}` for every key and returns the facts in the .meta files, by key.

    Raises `UserError` for bad input, before anything is written where that can be known, and leaves old files as they are then.
    """
    encoder = Encoder(job)
    files = rows.find(inputs)
    for path in files:
        if present := rows.columns(path):  # a file without rows has none
            check_columns(encoder.handler, path, present)
    try:
        with ExitStack() as stack:
            keys = encoder.handler.keys
            outputs = {key: Output(stack.enter_context(PairWriter(f"{prefix}_{key}_document", encoder.dtype))) for key in keys}
            meter = stack.enter_context(Meter(log_interval))
            for results, done in _in_order(encoder, _shards(files, encoder.handler), workers):
                for key, result in results.items():
                    outputs[key].add(result)
                meter.update(sum(len(r.lengths) for r in results.values()), sum(r.bytes for r in results.values()), done)
                _check_disk(prefix, sum(output.writer.bytes_written for output in outputs.values()), done)
            for key, output in outputs.items():
                if not output.writer.documents:
                    raise UserError(f"no document under {key!r} in {len(files)} files: {output.said()}; nothing was written")
            facts = {key: output.facts() | encoder.facts() for key, output in outputs.items()}
            for key, output in outputs.items():
                output.writer.commit(facts[key])
    except OSError as error:  # a full disk, a folder that may not be written
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}") from error
    for output in outputs.values():
        say(output.said())
    say(f"{meter.rates()} in {meter.seconds:.1f} s, {workers} processes")
    return facts


def _check_disk(prefix: str, written: int, done: float) -> None:
    """Stops early when what is still to come will not fit, going by what has been written so far."""
    left = written * (1 - done) / done if done >= 0.02 else 0
    free = shutil.disk_usage(Path(prefix).absolute().parent).free
    if left > free:
        raise UserError(f"{prefix}: about {left / 1e9:.1f} GB are still to be written, but {free / 1e9:.1f} GB are free")
