"""Training batches from data of any kind. The batch at a step is a pure function of (data, seed, consumed
samples).

It depends neither on the length of the run nor on the data-parallel size: a split is an endless sequence of
samples, epoch after epoch, and a batch is the next few. Several datasets are blended by weight with
Megatron's greedy rule over `PERIOD` samples, repeated forever, so any position of the sequence is known at
once.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import helpers

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.batch import Batch, stack
from ascendspeed.data.indexed.internevo import InternEvoDataset
from ascendspeed.data.indexed.masked_pair import MaskedPair
from ascendspeed.data.indexed.preference_pairs import PreferencePairs
from ascendspeed.data.indexed.text_pair import TextPair
from ascendspeed.data.mock import MockDataset
from ascendspeed.data.packing.rows import Sample
from ascendspeed.data.splits import SPLITS
from ascendspeed.data.streaming.hf_dataset import StreamedDataset
from ascendspeed.data.token_dataset import SampleSource, TokenDataset, out_of_vocabulary
from ascendspeed.utils import file_samples
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

PERIOD = 1 << 16
"""Samples after which a blend repeats; weights count to this precision."""

DATASET_KINDS: tuple[type[TokenDataset], ...] = (
    MockDataset,
    PreferencePairs,
    MaskedPair,
    TextPair,
    InternEvoDataset,
    StreamedDataset,
)
"""Kinds of data for `--data-path`; the first one that matches opens a path."""


class BlendedSamples:
    """Endless samples of a split, blended from all datasets."""

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float], vocab_size: int) -> None:
        self._sources = sources
        self._vocab_size = vocab_size
        self._source_index = np.zeros(PERIOD, np.int16)
        self._index_in_source = np.zeros(PERIOD, np.int64)
        shares = np.array(weights, np.float64) / sum(weights)
        helpers.build_blending_indices(
            self._source_index, self._index_in_source, shares, len(sources), PERIOD, False
        )
        self._counts = np.bincount(self._source_index, minlength=len(sources))

    @property
    def sources(self) -> Sequence[SampleSource]:
        """Samples of every dataset."""
        return self._sources

    @property
    def notes(self) -> list[str]:
        """Lines about the data for the log at the start."""
        return [source.note for source in self._sources if source.note]

    @property
    def estimated(self) -> bool:
        """True if `len` is an estimate."""
        return any(source.estimated for source in self._sources)

    def passes(self, samples: int) -> list[tuple[str, float]]:
        """Returns (dataset, epochs) for so many samples."""
        taken = self._counts * (samples / PERIOD)
        return [
            (source.prefix, float(count) / source.samples_per_epoch)
            for source, count in zip(self._sources, taken, strict=True)
        ]

    def __len__(self) -> int:
        """Samples in one epoch of every dataset; `sample` continues beyond."""
        return sum(source.samples_per_epoch for source in self._sources)

    def sample(self, number: int) -> Sample:
        """Returns sample `number` >= 0. Raises `UserError` for an id that the vocabulary does not have."""
        period, index = divmod(number, PERIOD)
        which = int(self._source_index[index])
        source = self._sources[which]
        sample = source.sample(period * int(self._counts[which]) + int(self._index_in_source[index]))
        for ids in sample[:2]:
            if int(ids.max()) >= self._vocab_size or int(ids.min()) < 0:
                foreign = ids[(ids >= self._vocab_size) | (ids < 0)][0]
                raise out_of_vocabulary(source.prefix, int(foreign), self._vocab_size)
        return sample


Weighted = Sequence[tuple[float, TokenDataset]]


def build_splits(
    data: DataConfig,
    seed: int,
    vocab_size: int,
    names: Sequence[str] = SPLITS,
    pairs: bool = False,
) -> dict[str, BlendedSamples]:
    """Builds the samples of the splits `names` out of `train`, `valid` and `test`.

    `vocab_size` is the model's, without padding; `pairs`: the run trains on preference pairs. Every rank may
    call this; nothing is communicated. Raises
    `UserError` for data that is missing or damaged, for ids beyond the vocabulary, and for a named split
    without a sample.
    """
    if not data.valid_data_path:
        datasets = _open_blend(data.data_path, data, vocab_size)
        _check_flags(data, [dataset for _, dataset in datasets])
        _check_pairs(datasets, pairs)
        return {name: _blend(datasets, name, data, seed, vocab_size) for name in names}
    configs = {
        "train": dataclasses.replace(data, split="1,0,0"),
        "valid": dataclasses.replace(data, data_path=data.valid_data_path, split="0,1,0"),
    }
    if absent := [name for name in names if name not in configs]:
        raise UserError(
            f"--valid-data-path: there is no {absent[0]} split then; leave it out and give --split"
        )
    opened = {name: _open_blend(configs[name].data_path, data, vocab_size) for name in names}
    _check_flags(data, [dataset for datasets in opened.values() for _, dataset in datasets])
    for datasets in opened.values():
        _check_pairs(datasets, pairs)
    return {
        name: _blend(datasets, name, configs[name], seed, vocab_size) for name, datasets in opened.items()
    }


def _open_blend(paths: Sequence[str], data: DataConfig, vocab_size: int) -> Weighted:
    datasets = [(weight, open_dataset(path, data, vocab_size)) for weight, path in parse_blend(paths)]
    for _, dataset in datasets:
        if dataset.has_loss_mask:
            continue
        if data.is_instruction_dataset:
            raise UserError(
                f"--is-instruction-dataset: {dataset.prefix} is plain text without labels; leave the flag out"
            )
        if data.packing:
            logger.info(
                f"{dataset.prefix}: plain text, cut where a sample ends; "
                f"--packing {data.packing} means nothing to it"
            )
    return datasets


def _check_flags(data: DataConfig, datasets: Sequence[TokenDataset]) -> None:
    """Raises `UserError` for a flag that applies to none of the data."""
    if data.packing and not any(dataset.has_loss_mask for dataset in datasets):
        unpacked = " (--no-pack)" if data.packing == "none" else ""
        raise UserError(
            f"--packing {data.packing}{unpacked} is for data with masks, and these are plain text; leave it "
            "out"
        )
    for flag in dict.fromkeys(flag for kind in DATASET_KINDS for flag in kind.flags):
        used = any(flag in dataset.flags for dataset in datasets)
        if not used and getattr(data, flag) != getattr(DataConfig, flag):
            kinds = " or ".join(kind.description for kind in DATASET_KINDS if flag in kind.flags)
            raise UserError(
                f"--{flag.replace('_', '-')} is for {kinds}, and there are none here; leave it out"
            )


def _check_pairs(datasets: Weighted, pairs: bool) -> None:
    """Raises `UserError` unless a run that trains on preference pairs has these, and another run has none."""
    for _, dataset in datasets:
        if dataset.holds_pairs and not pairs:
            raise UserError(
                f"{dataset.prefix} holds preference pairs, which --stage dpo or rm trains on; add --stage"
            )
        if pairs and not dataset.holds_pairs:
            raise UserError(
                f"{dataset.prefix} holds no preference pairs, which this --stage needs: make them by "
                "tools/preprocess_data.py with a pairwise --handler-name"
            )


def _blend(datasets: Weighted, name: str, data: DataConfig, seed: int, vocab_size: int) -> BlendedSamples:
    sources = [dataset.samples(name, data, seed) for _, dataset in datasets]
    return BlendedSamples(sources, [weight for weight, _ in datasets], vocab_size)


def micro_batches(
    samples: BlendedSamples,
    consumed: int,
    global_batch: int,
    micro_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> list[Batch]:
    """Returns one data-parallel rank's micro-batches of the global batch that begins after `consumed`
    samples.

    As in Megatron, one round of micro-batches over all ranks is a range of consecutive samples, so all ranks
    together have the samples consumed ... consumed + global_batch - 1. Raises `UserError` if the batch sizes
    do not divide.
    """
    if global_batch % (micro_batch * dp_size):
        raise UserError(
            f"--global-batch-size {global_batch} is not a multiple of micro batch {micro_batch} x {dp_size} "
            "ranks"
        )
    batches = []
    for start in micro_batch_starts(consumed, global_batch, micro_batch, dp_rank, dp_size):
        batches.append(stack([samples.sample(number) for number in range(start, start + micro_batch)]))
    return batches


def micro_batch_starts(
    consumed: int, global_batch: int, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
) -> range:
    """Returns the first sample of each of a rank's micro-batches."""
    return range(consumed + dp_rank * micro_batch, consumed + global_batch, micro_batch * dp_size)


def parse_blend(data_path: Sequence[str]) -> list[tuple[float, str]]:
    """Parses `--data-path`: one prefix, or weights and prefixes -> [(weight, prefix)]."""
    if len(data_path) == 1:
        return [(1.0, data_path[0])]
    if not data_path or len(data_path) % 2:
        given = " ".join(data_path) or "nothing"
        raise UserError(f"--data-path takes one prefix, or weights and prefixes (0.3 a 0.7 b), not {given}")
    blend = [(_weight(word), prefix) for word, prefix in zip(data_path[::2], data_path[1::2], strict=True)]
    smallest, prefix = min(blend)
    if smallest * PERIOD < sum(weight for weight, _ in blend):
        raise UserError(
            f"--data-path: the weight {smallest} of {prefix} is less than 1/{PERIOD} of all weights"
        )
    return blend


def _weight(word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"--data-path: {word!r} is not a weight; give weights and prefixes: 0.3 a 0.7 b")
    return weight


def dataset_kind(path: str) -> type[TokenDataset]:
    """Returns the kind of data that a path names; if none matches, `TextPair`, whose errors name the missing
    files."""
    return next((kind for kind in DATASET_KINDS if kind.match(path)), TextPair)


def open_dataset(path: str, data: DataConfig, vocab_size: int) -> TokenDataset:
    """Opens the data that --data-path names and checks that files are complete, belong together and fit the
    vocabulary."""
    return dataset_kind(path).open(path, data, vocab_size)


def dataset_files(path: str) -> list[Path]:
    """Returns all files that --data-path names."""
    return dataset_kind(path).files(path)


def hash_dataset(path: str) -> str:
    """Returns a SHA-256 of the names and sizes of all files that --data-path names and of samples of their
    content: a small, constant cost, by which other data under the same name are noticed."""
    files = dataset_files(path)
    digest = hashlib.sha256()
    for file in files:
        samples = max(2, file_samples.SAMPLES // len(files))
        digest.update(f"{file.name} {file_samples.hash_samples(file, samples)}\n".encode())
    return digest.hexdigest()


def dataset_facts(path: str) -> dict[str, Any]:
    """Returns what preprocessing recorded about the data of `--data-path`; empty for data of other tools."""
    return dataset_kind(path).facts(path)
