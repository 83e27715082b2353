"""Rows -> `P_<key>_document.{bin,idx}`, by any number of processes, always the same bytes.

The input is cut into shards that do not depend on the number of processes; each is read, handled and tokenized by one process,
and the results are written in the order of the shards. No more shards are under way than a few per process, which bounds memory.
"""

import logging
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from ascendspeed.data.document_progress import Meter
from ascendspeed.data.handlers.base import MAX_DOCUMENT_BYTES, EncoderConfig, Handler
from ascendspeed.data.handlers.registry import check_columns, unread_columns
from ascendspeed.data.indexed.masked_pair import DTYPE, MaskedPairWriter
from ascendspeed.data.indexed.megatron_pair import PairWriter, dtype_for
from ascendspeed.data.readers import registry
from ascendspeed.data.readers.shard import Shard
from ascendspeed.data.shard_output import DatasetOutput, Gathered, ShardDocuments
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

logger = logging.getLogger(__name__)

__all__ = ["MAX_DOCUMENT_BYTES", "EncoderConfig", "preprocess"]

FLAT = (".csv", ".txt", ".csv.gz", ".txt.gz")
"""Files whose rows hold nothing but text."""


class ShardEncoder:
    """Turns shards into results; one per process."""

    def __init__(self, job: EncoderConfig) -> None:
        self.job, self.maker = job, DocumentEncoder(job)
        self.handler = self.maker.handler
        self.masked = self.handler.learns_answers
        self.dtype = DTYPE if self.masked else dtype_for(self.maker.tokenizer.vocab_size)

    def encode(self, shard: Shard) -> dict[str, ShardDocuments]:
        """Key -> what the rows of the shard make."""
        gathered = {key: Gathered(shard.path, self.dtype, self.masked) for key in self.handler.keys}
        for batch in registry.read(shard, self.handler.columns):
            for key, made in self.maker.make(batch).items():
                gathered[key].add(made, batch.places)
        return {key: one.result() for key, one in gathered.items()}

    def writer(self, prefix: str, key: str) -> PairWriter | MaskedPairWriter:
        """Of the files under a key."""
        return MaskedPairWriter(prefix) if self.masked else PairWriter(f"{prefix}_{key}_document", self.dtype)

    def facts(self) -> dict[str, Any]:
        """How the documents were made, for P.meta."""
        tokenizer = self.maker.tokenizer
        eod = tokenizer.eos if self.job.append_eod else None
        facts = {
            "vocab_size": tokenizer.vocab_size,
            "eod": eod,
            "handler": self.job.handler_name,
            "dtype": self.dtype.name,
        }
        return facts | self.handler.facts | ({"seq_length": self.job.seq_length} if self.masked else {})


_encoder: ShardEncoder | None = None  # of this process, when it is one of the pool


def _begin(job: EncoderConfig) -> None:
    """A process of the pool: ends with its parent, even one that is killed, instead of waiting for work for ever."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _encoder = ShardEncoder(job)


def _encode(shard: Shard) -> dict[str, ShardDocuments]:
    assert _encoder is not None
    return _encoder.encode(shard)


def _in_order(
    encoder: ShardEncoder, shards: Iterator[tuple[Shard, float]], workers: int
) -> Iterator[tuple[dict[str, ShardDocuments], float]]:
    """(result, share of the input done) of every shard in order, made by `workers` processes."""
    if workers == 1:
        for shard, done in shards:
            yield encoder.encode(shard), done
        return
    # Started afresh, not forked: a fork of a process with threads (Arrow's) may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (encoder.job,))
    waiting: deque[tuple[Future[dict[str, ShardDocuments]], float]] = deque()
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


def _first(
    waiting: deque[tuple[Future[dict[str, ShardDocuments]], float]],
) -> tuple[dict[str, ShardDocuments], float]:
    future, done = waiting.popleft()
    return future.result(), done


def _shards(files: Sequence[Path], made_by: Handler) -> Iterator[tuple[Shard, float]]:
    """Every shard, with the share of all bytes that lie in it and before it."""
    sizes = [path.stat().st_size for path in files]
    done = 0.0
    for path, size in zip(files, sizes, strict=True):
        for shard in registry.shards(path, made_by.columns):
            done += shard.weight * size / max(1, sum(sizes))
            yield shard, min(done, 1.0)


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str,
    job: EncoderConfig,
    workers: int = 1,
    log_interval: int = 1000,
    strict: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes `<prefix>_<key>_document.{bin,idx,meta}` for every key and returns the facts in the .meta files, by key.

    `strict`: the first row that makes no document is an error. Raises `UserError` for bad input, before anything is written where
    that can be known, and leaves old files as they are then.
    """
    encoder = ShardEncoder(job)
    files = registry.find_files(inputs)
    present = {path: registry.columns(path) for path in files}
    _check_files(encoder.handler, present, strict)
    for note in (*encoder.handler.notes, *_unread(encoder.handler, present)):
        logger.info(f"note: {note}")
    try:
        outputs, facts, meter = _written(encoder, files, prefix, workers, log_interval, strict)
    except OSError as error:  # a full disk, a folder that may not be written
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}") from error
    for output in outputs.values():
        for line in (output.said(), *output.faults.lines()):
            logger.info(line)
    logger.info(f"{meter.rates()} in {meter.seconds:.1f} s, {workers} processes")
    return facts


def _written(
    encoder: ShardEncoder, files: Sequence[Path], prefix: str, workers: int, log_interval: int, strict: bool
) -> tuple[dict[str, DatasetOutput], dict[str, dict[str, Any]], Meter]:
    """(what was made, what the .meta files say of it, how long it took), all committed."""
    with ExitStack() as stack:
        writers = {key: stack.enter_context(encoder.writer(prefix, key)) for key in encoder.handler.keys}
        outputs = {
            key: DatasetOutput(writer, strict, encoder.job.seq_length) for key, writer in writers.items()
        }
        meter = stack.enter_context(Meter(log_interval))
        for results, done in _in_order(encoder, _shards(files, encoder.handler), workers):
            for key, result in results.items():
                outputs[key].add(result)
            meter.update(
                sum(len(r.lengths) for r in results.values()), sum(r.bytes for r in results.values()), done
            )
            _check_disk(prefix, sum(output.writer.bytes_written for output in outputs.values()), done)
        for key, output in outputs.items():
            _check_output(key, output, files)
        facts = {key: output.facts() | encoder.facts() for key, output in outputs.items()}
        for key, output in outputs.items():
            output.writer.commit(facts[key])
    return outputs, facts, meter


def _check_output(key: str, output: DatasetOutput, files: Sequence[Path]) -> None:
    """Raises `UserError` when there is nothing to write."""
    if not output.rows:
        raise UserError(f"no rows in {shorten_list(files, 1)}")
    if not output.writer.documents:
        why = "; ".join([output.said(), *output.faults.lines()[:1]])
        raise UserError(f"no document under {key!r} in {len(files)} files: {why}; nothing was written")


def _unread(made_by: Handler, files: Mapping[Path, Sequence[str]]) -> Iterator[str]:
    """Columns that are not read, once for all files that have the same."""
    said: dict[str, list[Path]] = {}
    for path, present in files.items():
        said.setdefault(unread_columns(made_by, present), []).append(path)
    for what, paths in said.items():
        if what:
            yield f"{shorten_list(paths, 1)}: {what}"


def _check_files(made_by: Handler, files: Mapping[Path, Sequence[str]], strict: bool) -> None:
    """Raises `UserError` for files (path -> columns) that the handler cannot read. Of instruction data one that can be is enough:
    the rows of the others are counted as what they are."""
    wrong = []
    for path, present in files.items():
        flat = next((name for name in made_by.nested if name in present), None)
        if flat and path.name.lower().endswith(FLAT):
            raise UserError(
                f"{path}: the column {flat!r} holds lists, which such a file cannot: use jsonl or parquet"
            )
        try:
            if present:  # a file without rows has none
                check_columns(made_by, path, present)
        except UserError as error:
            wrong.append(error)
    if wrong and (strict or not made_by.learns_answers or len(wrong) == len(files)):
        raise wrong[0]


def _check_disk(prefix: str, written: int, done: float) -> None:
    """Stops early when what is still to come will not fit, going by what has been written so far."""
    left = written * (1 - done) / done if done >= 0.02 else 0
    free = shutil.disk_usage(Path(prefix).absolute().parent).free
    if left > free:
        raise UserError(
            f"{prefix}: about {left / 1e9:.1f} GB are still to be written, but {free / 1e9:.1f} GB are free"
        )
