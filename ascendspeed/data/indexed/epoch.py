"""One epoch of plain text as a Megatron `GPTDataset`.

Megatron builds a dataset for as many samples as the run needs and shuffles its epochs together, so the sample
at an index depends on the length of the run. Here every epoch is a dataset of its own, shuffled with seed +
epoch: the sample at an index never changes, and only one epoch has to be built. Within an epoch, document
order, splits and sample order are Megatron's.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    _build_document_index,
    _build_shuffle_index,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from ascendspeed.utils.atomic import publish_folder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

MIN_CACHED = 4 << 20
"""Documents plus samples from which on the indices of an epoch are cached in files that ranks share; for
smaller data, every rank builds its own in less than a second."""
INDICES = ("documents", "samples", "shuffle")
HASHES = "sha256.json"
"""File of a cache: name of a file -> SHA-256."""
CACHE_VERSION = 2
"""Version of the files, a part of the key of their folder."""

Indices = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class NoTokenizer:
    """The tokenizer fields that `GPTDataset` reads. Nothing is padded, because every sample is full; the pad
    id of InternLM is its eos, which is supervised."""

    vocab_size: int | None = None
    pad: int = -1
    eod: int = -2
    unique_identifiers: tuple[str, ...] = ()


class EpochDataset(GPTDataset):
    """One epoch over `documents` [n] int32 of an indexed dataset: samples of `seq_length` tokens, all
    full."""

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: np.ndarray,
        split: Split,
        seq_length: int,
        seed: int,
        cache: Path | None,
    ) -> None:
        """`seed` is this epoch's; `cache` is a folder for the indices of large datasets."""
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            tokenizer=NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,  # s x s
        )
        self._cache = cache
        super().__init__(indexed, indexed.path_prefix, documents, None, split, config)

    def _build_document_sample_shuffle_indices(self) -> Indices:
        tokens = self._get_num_tokens_per_epoch()
        if self._cache is None or len(self.indices) + tokens // self.config.sequence_length < MIN_CACHED:
            return self._build(tokens)
        key: list[int | str] = [CACHE_VERSION]
        for suffix in ("bin", "idx"):
            stat = Path(f"{self.dataset.path_prefix}.{suffix}").stat()
            key.append(f"{stat.st_size} {stat.st_mtime_ns}")
        key += [self.indices[0], self.indices[-1], self.config.sequence_length, self.config.random_seed]
        digest = hashlib.sha256(" ".join(map(str, key)).encode()).hexdigest()[:16]
        folder = self._cache / f"{Path(self.dataset.path_prefix).name}-{digest}"
        return load_or_build(folder, lambda: self._build(tokens))

    def _build(self, tokens: int) -> Indices:
        random = np.random.RandomState(self.config.random_seed)
        documents = _build_document_index(self.indices, 1, random, False)
        lengths = self.dataset.sequence_lengths
        samples = helpers.build_sample_idx(
            lengths, documents, self.config.sequence_length, 1, tokens, True, True
        )
        count = samples.shape[0] - 1
        return documents, samples, _build_shuffle_index(count, count, random)


def load_or_build(folder: Path, build: Callable[[], Indices]) -> Indices:
    """Memory-maps the arrays in `folder`, whose hashes are checked; they are built first if they do not
    exist.

    The first process builds them, and the others on the machine wait. The folder appears complete; if the
    file lock does not work between machines, two of them build the same folder and one of the two remains.
    Raises `UserError`.
    """
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.is_dir():
                    _write(folder, build())
        _check_hashes(folder)
        return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in INDICES)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: the sample indices cannot be cached here: {error}; choose another --data-cache-path"
        ) from error


def _check_hashes(folder: Path) -> None:
    """Raises `UserError` for a file of the cache that is not the one that was written."""
    expected = read_json_object(folder / HASHES) if (folder / HASHES).is_file() else {}
    for name in INDICES:
        path = folder / f"{name}.npy"
        if not path.is_file() or _hash(path) != expected.get(path.name):
            raise UserError(f"{path} is damaged: remove {folder}, and it is built again")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, arrays: Indices) -> None:
    temporary = Path(f"{folder}.{os.uname().nodename}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, array in zip(INDICES, arrays, strict=True):
        np.save(temporary / f"{name}.npy", array, allow_pickle=False)
    hashes = {path.name: _hash(path) for path in temporary.iterdir()}
    (temporary / HASHES).write_text(json.dumps(hashes))
    try:
        publish_folder(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # otherwise another machine was faster, with the same content
            raise
