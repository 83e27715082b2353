"""Preprocesses raw files into `P_<key>_document.{bin,idx}` with any number of processes and identical output.

The input is split into shards that do not depend on the number of processes. One process reads, handles and
tokenizes a shard, and the results are written in the order of the shards. Only a few shards per process are
in flight, which bounds memory.
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
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import Any

from ascendspeed.data.document_progress import DocumentProgress
from ascendspeed.data.handlers.base import MAX_DOCUMENT_BYTES, EncoderConfig, Handler
from ascendspeed.data.handlers.registry import check_columns, unread_columns
from ascendspeed.data.indexed.masked_pair import DTYPE, MaskedPairWriter, keys_of, pair_prefix
from ascendspeed.data.indexed.megatron_pair import ENCODING_FACT, PairWriter, dtype_for
from ascendspeed.data.readers import registry
from ascendspeed.data.readers.shard import Shard
from ascendspeed.data.shard_output import DatasetOutput, ShardDocuments
from ascendspeed.data.source_record import SOURCE, refuse_other_source, source_digest
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.tokenization.fingerprint import hash_encoding
from ascendspeed.utils.atomic import describe_write_error
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

logger = logging.getLogger(__name__)

__all__ = ["MAX_DOCUMENT_BYTES", "EncoderConfig", "preprocess"]

SHARDS_PER_WORKER = 2
"""Shards in flight for each process."""
MIN_FRACTION = 0.02
"""Part of the input after which the size of the output is extrapolated."""

MUCH_INPUT = 2 << 20
"""Bytes of input for a process that pay for the preparation of its tokenizer at the start."""

ShardResult = dict[str, ShardDocuments]
"""Key of the handler -> documents of one shard."""


class ShardEncoder:
    """Reads and encodes shards. One per process."""

    def __init__(self, config: EncoderConfig) -> None:
        """Raises `UserError` as `DocumentEncoder` does."""
        self.config = config
        self._encoder = DocumentEncoder(config)
        self.handler = self._encoder.handler
        self._masked = self.handler.has_loss_mask
        self._dtype = DTYPE if self._masked else dtype_for(self._encoder.tokenizer.vocab_size)

    def log_slowness(self) -> None:
        """Logs what makes the tokenizer slow."""
        self._encoder.tokenizer.log_slowness()

    def prepare(self) -> None:
        """Prepares the tokenizer for much text."""
        self._encoder.tokenizer.prepare()

    def encode(self, shard: Shard) -> ShardResult:
        """Returns the documents of a shard by key."""
        result = {key: ShardDocuments(shard.path, self._dtype, self._masked) for key in self.handler.keys}
        for batch in registry.read(shard, self.handler.columns):
            for key, encoded in self._encoder.encode(batch).items():
                result[key].add(encoded, batch.locations)
        for documents in result.values():
            documents.join()
        return result

    def prefixes(self, prefix: str) -> list[str]:
        """Returns the prefixes of all pairs that are written."""
        if self._masked:
            return [pair_prefix(prefix, key) for stem in self.handler.keys for key in keys_of(stem)]
        return [pair_prefix(prefix, key) for key in self.handler.keys]

    def source(self, files: Sequence[Path]) -> str:
        """Returns the identity of the input and the settings, for P.meta."""
        return source_digest(files, self._encoder.identity)

    def writer(self, prefix: str, key: str) -> PairWriter | MaskedPairWriter:
        """Opens the output files of a key."""
        return (
            MaskedPairWriter(prefix, key)
            if self._masked
            else PairWriter(pair_prefix(prefix, key), self._dtype)
        )

    def facts(self) -> dict[str, Any]:
        """Settings for P.meta."""
        tokenizer = self._encoder.tokenizer
        facts = {
            "vocab_size": tokenizer.vocab_size,
            ENCODING_FACT: hash_encoding(tokenizer),
            "eod": tokenizer.eos if self.config.append_eod else None,
            "handler": self.config.handler_name,
            "dtype": self._dtype.name,
        }
        facts |= self.handler.facts
        if self._masked:
            facts["seq_length"] = self.config.seq_length
        return facts


_encoder: ShardEncoder | None = None  # set in the processes of the pool


def _start_worker(config: EncoderConfig, prepares: bool) -> None:
    """Initializes a process of the pool, which exits with its parent even if that is killed."""
    global _encoder
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _encoder = ShardEncoder(config)
    if prepares:
        _encoder.prepare()


def _encode(shard: Shard) -> ShardResult:
    assert _encoder is not None
    return _encoder.encode(shard)


def _encode_in_order(
    encoder: ShardEncoder, shards: Iterator[tuple[Shard, float]], workers: int, prepares: bool
) -> Iterator[tuple[ShardResult, float]]:
    """Encodes shards with `workers` processes, which prepare their tokenizers if `prepares`; yields (result,
    fraction of the input that is done) in order."""
    if workers == 1:
        if prepares:
            encoder.prepare()
        for shard, done in shards:
            yield encoder.encode(shard), done
        return
    # Spawned, not forked: a fork of a process with threads (Arrow's) may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoder.config, prepares))
    earlier = set(active_children())
    pending: deque[tuple[Future[ShardResult], float]] = deque()
    finished = False
    try:
        for shard, done in shards:
            with _without_interrupts():  # the worker that this starts inherits the mask
                pending.append((pool.submit(_encode, shard), done))
            if len(pending) >= SHARDS_PER_WORKER * workers:
                yield _pop_first(pending)
        while pending:
            yield _pop_first(pending)
        finished = True
    except BrokenProcessPool as error:
        raise UserError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
    finally:
        if not finished:  # do not wait for the shards in work
            for worker in set(active_children()) - earlier:
                worker.terminate()
        # Waits for the pool's thread, which would close a pipe that the interpreter writes to when it ends.
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Holds back Ctrl-C, for a moment: it is the parent's, and a worker at its start would print a
    traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _pop_first(pending: deque[tuple[Future[ShardResult], float]]) -> tuple[ShardResult, float]:
    future, done = pending.popleft()
    return future.result(), done


def _shards(files: Sequence[Path], handler: Handler) -> Iterator[tuple[Shard, float]]:
    """Yields every shard with the fraction of all bytes up to its end."""
    sizes = [path.stat().st_size for path in files]
    total = max(1, sum(sizes))
    done = 0.0
    for path, size in zip(files, sizes, strict=True):
        for shard in registry.shards(path, handler.columns):
            done += shard.weight * size / total
            yield shard, min(done, 1.0)


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str,
    config: EncoderConfig,
    workers: int = 1,
    log_interval: int = 1000,
    strict: bool = False,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes `<prefix>_<key>_document.{bin,idx,meta}` for every key; returns the content of the .meta files
    by key.

    `strict`: the first row that gives no document is an error. `overwrite`: replace data of the prefix that
    are made from other files or with other settings. Raises `UserError` for bad input, if possible
    before anything is written, and then leaves old files as they are.
    """
    encoder = ShardEncoder(config)
    files = registry.find_files(inputs)
    source = encoder.source(files)
    if not overwrite:
        refuse_other_source(encoder.prefixes(prefix), source)
    columns = {path: registry.columns(path) for path in files}
    _check_files(encoder.handler, columns, strict)
    encoder.log_slowness()
    for note in (*encoder.handler.notes, *_unread_notes(encoder.handler, columns)):
        logger.info(f"note: {note}")
    try:
        outputs, facts, progress = _write_outputs(
            encoder, files, prefix, source, workers, log_interval, strict
        )
    except OSError as error:  # a full disk, a read-only folder
        path = Path(error.filename or prefix)
        raise UserError(f"{path}: {describe_write_error(path, error)}") from error
    for output in outputs.values():
        for line in (output.summary(), *output.counts.skipped.lines()):
            logger.info(line)
    logger.info(f"{progress.rates()} in {progress.seconds:.1f} s, {workers} processes")
    return facts


def _write_outputs(
    encoder: ShardEncoder,
    files: Sequence[Path],
    prefix: str,
    source: str,
    workers: int,
    log_interval: int,
    strict: bool,
) -> tuple[dict[str, DatasetOutput], dict[str, dict[str, Any]], DocumentProgress]:
    """Writes and commits all outputs; returns them and the content of their .meta files, both by key."""
    with ExitStack() as stack:
        outputs = {}
        for key in encoder.handler.keys:
            writer = encoder.writer(prefix, key)
            stack.enter_context(writer)
            outputs[key] = DatasetOutput(writer, strict, encoder.config.seq_length)
        progress = stack.enter_context(DocumentProgress(log_interval))
        prepares = sum(path.stat().st_size for path in files) >= MUCH_INPUT * workers
        shards = _shards(files, encoder.handler)
        for result, done in _encode_in_order(encoder, shards, workers, prepares):
            for key, shard in result.items():
                outputs[key].add(shard)
            documents = sum(len(shard.lengths) for shard in result.values())
            progress.update(documents, sum(shard.counts.bytes for shard in result.values()), done)
            _check_disk(prefix, sum(output.writer.bytes_written for output in outputs.values()), done)
        for key, output in outputs.items():
            _check_output(key, output, files)
        facts = {key: output.facts() | encoder.facts() | {SOURCE: source} for key, output in outputs.items()}
        for key, output in outputs.items():
            output.writer.commit(facts[key])
    return outputs, facts, progress


def _check_output(key: str, output: DatasetOutput, files: Sequence[Path]) -> None:
    """Raises `UserError` if there is no document to write."""
    if not output.counts.rows:
        raise UserError(f"no rows in {shorten_list(files, 1)}")
    if not output.writer.documents:
        reasons = "; ".join([output.summary(), *output.counts.skipped.lines()[:1]])
        raise UserError(f"no document under {key!r} in {len(files)} files: {reasons}; nothing was written")


def _unread_notes(handler: Handler, columns: Mapping[Path, Sequence[str]]) -> Iterator[str]:
    """Yields notes about columns that are not read, one for all files with the same columns."""
    files_by_note: dict[str, list[Path]] = {}
    for path, names in columns.items():
        files_by_note.setdefault(unread_columns(handler, names), []).append(path)
    for note, paths in files_by_note.items():
        if note:
            yield f"{shorten_list(paths, 1)}: {note}"


def _check_files(handler: Handler, columns: Mapping[Path, Sequence[str]], strict: bool) -> None:
    """Raises `UserError` for files that the handler cannot read.

    For instruction data one readable file is enough: the rows of the others are counted as faults.
    """
    errors = []
    for path, names in columns.items():
        try:
            if names:  # a file without rows has no columns
                check_columns(handler, path, names)
        except UserError as error:
            errors.append(error)
    if errors and (strict or not handler.has_loss_mask or len(errors) == len(columns)):
        raise errors[0]


def _check_disk(prefix: str, written: int, done: float) -> None:
    """Raises `UserError` early if the rest of the output will not fit on the disk, extrapolated from what is
    written."""
    remaining = written * (1 - done) / done if done >= MIN_FRACTION else 0
    free = shutil.disk_usage(Path(prefix).absolute().parent).free
    if remaining > free:
        raise UserError(
            f"{prefix}: about {remaining / 1e9:.1f} GB are still to be written, but {free / 1e9:.1f} GB are "
            "free"
        )
