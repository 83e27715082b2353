"""One pass over the documents of a split, as a Megatron `GPTDataset`.

Megatron builds a data set for as many samples as the run asks for and shuffles its epochs together, so that the sample at a
place depends on the length of the run. Here every epoch is a data set of its own, shuffled with seed + epoch: what comes at a
place never changes, and no more than an epoch has to be built. Within it documents, cuts and order are Megatron's own.
"""

import fcntl
import hashlib
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

MIN_CACHED = 4 << 20
"""Documents and samples from which on the indices of an epoch are kept in files, shared by the ranks; below, every rank makes
its own in less than a second."""
INDICES = ("documents", "samples", "shuffle")

Indices = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class NoTokenizer:
    """What GPTDataset wants to know of a tokenizer. Nothing is padded: every sample is full, and the pad id of InternLM is its
    eos, which is to be learnt."""

    vocab_size: int | None = None
    pad: int = -1
    eod: int = -2
    unique_identifiers: tuple[str, ...] = ()


class EpochDataset(GPTDataset):
    """Epoch number `epoch` of `documents` [n] int32 of an indexed data set: samples of `seq_length` tokens, all full."""

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: np.ndarray,
        split: Split,
        seq_length: int,
        seed: int,
        cache: Path | None,
    ) -> None:
        """`seed` is that of this epoch; `cache` a folder for the indices of large data sets."""
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            tokenizer=NoTokenizer(),  # type: ignore[arg-type]
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
        said = (
            *(
                f"{p.stat().st_size} {p.stat().st_mtime_ns}"
                for p in (Path(f"{self.dataset.path_prefix}.{x}") for x in ("bin", "idx"))
            ),
            *(self.indices[0], self.indices[-1], self.config.sequence_length, self.config.random_seed),
        )
        digest = hashlib.sha256(" ".join(map(str, said)).encode()).hexdigest()[:16]
        return load_or_build(
            self._cache / f"{Path(self.dataset.path_prefix).name}-{digest}", lambda: self._build(tokens)
        )

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
    """The arrays in `folder`, mapped; made first if they are not there.

    Whoever comes first builds, the others on the machine wait for it. The folder appears whole; should the lock mean nothing
    between machines, two of them make the same folder and one of the two stays.
    """
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.is_dir():
                    _write(folder, build())
        return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in INDICES)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: the sample indices cannot be kept here: {error}; choose another --data-cache-path"
        ) from error


def _write(folder: Path, arrays: Indices) -> None:
    temporary = Path(f"{folder}.{os.uname().nodename}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, array in zip(INDICES, arrays, strict=True):
        np.save(temporary / f"{name}.npy", array, allow_pickle=False)
    try:
        publish_folder(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else another machine was faster, with the same content
            raise
