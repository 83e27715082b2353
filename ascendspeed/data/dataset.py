"""Indexed data -> batches. The batch at a step is a pure function of (data, seed, consumed samples).

It depends neither on the length of the run nor on the data-parallel size: a split is an endless row of samples, number 0, 1,
2 and so on, epoch after epoch (`epoch.py`), and a batch is the next few. Several data sets are blended by weight with
Megatron's greedy rule over `PERIOD` samples, repeated for ever, which makes any place of the row known at once.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.indexed import internevo, masked_pair
from ascendspeed.data.indexed.epoch import EpochDataset
from ascendspeed.data.indexed.internevo import InternEvoDataset
from ascendspeed.data.indexed.masked_pair import MaskedPair
from ascendspeed.data.indexed.megatron_pair import check_pair, pair_file, read_facts
from ascendspeed.data.packing.internevo import CUT, packer
from ascendspeed.data.packing.packed_dataset import PackedSamples, Sample
from ascendspeed.data.splits import SPLITS, describe_split, split_range
from ascendspeed.data.streaming import hf_dataset
from ascendspeed.data.streaming.hf_dataset import StreamedDataset
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

PERIOD = 1 << 16
"""Samples after which a blend repeats; weights count to this precision."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU; every tensor [b, s]."""

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64: the token after each token; any, where it does not count."""
    loss_mask: Tensor
    """float32: 1 where the label counts."""
    position_ids: Tensor
    """int64; 0 at position 0, and wherever else a document begins that is not to see those before it."""


class SampleSource(Protocol):
    """The samples of one data set in one split, without end."""

    prefix: str
    """What the user calls it, for messages."""
    samples_per_epoch: int
    """Above 0."""

    estimated: bool
    """Whether `samples_per_epoch` is not exact, because the data are tokenized while they are trained on."""

    @property
    def note(self) -> str:
        """What there is to say about it at the start, one line; empty: nothing."""

    def sample(self, number: int) -> Sample:
        """Sample `number` >= 0; numbers beyond an epoch go on into the next one."""


class TextSamples:
    """Plain documents one after the other, cut into samples wherever these end: pre-training."""

    note = ""
    estimated = False

    def __init__(
        self, indexed: IndexedDataset, documents: range, split: str, data: DataConfig, seed: int
    ) -> None:
        """`documents` are those of the split. Raises `UserError` if they do not fill one sample."""
        self.prefix = indexed.path_prefix
        self._indexed, self._split, self._data, self._seed = indexed, Split[split], data, seed
        self._documents = np.arange(documents.start, documents.stop, dtype=np.int32)
        tokens = int(indexed.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
        self.samples_per_epoch = max(0, tokens - 1) // data.seq_length
        if not self.samples_per_epoch:
            raise UserError(
                f"{self.prefix}: {describe_split(data, split, len(documents), len(indexed))} with {tokens} tokens, and one sample of "
                f"--seq-length {data.seq_length} takes {data.seq_length + 1}"
            )
        self._epochs: dict[int, EpochDataset] = {}

    def sample(self, number: int) -> Sample:
        """Sample `number` >= 0; numbers beyond an epoch go on into the next one."""
        epoch, place = divmod(number, self.samples_per_epoch)
        found = self._epoch(epoch)[place]
        return found["tokens"], found["labels"], found["loss_mask"], found["position_ids"]

    def _epoch(self, number: int) -> EpochDataset:
        if number not in self._epochs:
            self._epochs = {
                n: e for n, e in self._epochs.items() if n == number - 1
            }  # a batch may reach over an edge
            cache = self._data.data_cache_path or Path(self.prefix).parent / "index-cache"
            self._epochs[number] = EpochDataset(
                self._indexed,
                self._documents,
                self._split,
                self._data.seq_length,
                self._seed + number,
                Path(cache),
            )
        return self._epochs[number]


class BlendedSamples:
    """The samples of a split over all data sets, without end."""

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float], vocab_size: int) -> None:
        self._sources, self._vocab_size = sources, vocab_size
        self._which, self._place = np.zeros(PERIOD, np.int16), np.zeros(PERIOD, np.int64)
        share = np.array(weights, np.float64) / sum(weights)
        helpers.build_blending_indices(self._which, self._place, share, len(sources), PERIOD, False)
        self._counts = np.bincount(self._which, minlength=len(sources))

    @property
    def notes(self) -> list[str]:
        """What there is to say about the data at the start."""
        return [source.note for source in self._sources if source.note]

    @property
    def estimated(self) -> bool:
        """Whether `len` is not exact."""
        return any(source.estimated for source in self._sources)

    def passes(self, samples: int) -> list[tuple[str, float]]:
        """(data set, how often it is gone through) of that many samples."""
        taken = self._counts * (samples / PERIOD)
        return [
            (one.prefix, float(n) / one.samples_per_epoch)
            for one, n in zip(self._sources, taken, strict=True)
        ]

    def __len__(self) -> int:
        """Samples in one epoch of every data set; `sample` goes on beyond."""
        return sum(source.samples_per_epoch for source in self._sources)

    def sample(self, number: int) -> Sample:
        """Sample `number` >= 0. Raises `UserError` for an id that the vocabulary does not have."""
        period, rest = divmod(number, PERIOD)
        which = int(self._which[rest])
        sample = self._sources[which].sample(period * int(self._counts[which]) + int(self._place[rest]))
        for ids in sample[:2]:
            if int(ids.max()) >= self._vocab_size or int(ids.min()) < 0:
                bad = ids[(ids >= self._vocab_size) | (ids < 0)][0]
                raise UserError(_foreign(self._sources[which].prefix, int(bad), self._vocab_size))
        return sample


def build_splits(
    data: DataConfig,
    seed: int,
    vocab_size: int,
    names: Sequence[str] = SPLITS,
) -> dict[str, BlendedSamples]:
    """Name -> samples, for the splits that will be used, of `train`, `valid` and `test`.

    `vocab_size` is the model's, without padding. Every rank may call it; nothing is communicated.
    Raises `UserError` for data that is missing or damaged, for ids beyond the vocabulary, and for a named split without a sample.
    """
    if not data.valid_data_path:
        opened = _opened(data.data_path, data, vocab_size)
        _check_flags(data, opened)
        return {name: _samples(opened, name, data, seed, vocab_size) for name in names}
    own = {"train": (data.data_path, "1,0,0"), "valid": (data.valid_data_path, "0,1,0")}
    if absent := [name for name in names if name not in own]:
        raise UserError(
            f"--valid-data-path: there is no {absent[0]} split then; leave it out and give --split"
        )
    found = {name: _opened(own[name][0], data, vocab_size) for name in names}
    _check_flags(data, [one for opened in found.values() for one in opened])
    named = {name: dataclasses.replace(data, data_path=own[name][0], split=own[name][1]) for name in names}
    return {name: _samples(opened, name, named[name], seed, vocab_size) for name, opened in found.items()}


Opened = IndexedDataset | MaskedPair | InternEvoDataset | StreamedDataset


def _opened(paths: Sequence[str], data: DataConfig, vocab_size: int) -> list[tuple[float, Opened]]:
    found = [(weight, open_dataset(path, data, vocab_size)) for weight, path in parse_blend(paths)]
    for _, one in found:
        if _masked(one):
            continue
        name = one.path_prefix if isinstance(one, IndexedDataset) else one.prefix
        if data.is_instruction_dataset:
            raise UserError(
                f"--is-instruction-dataset: {name} is plain text without labels; leave the flag out"
            )
        if data.packing:
            logger.info(
                f"{name}: plain text, cut where a sample ends; --packing {data.packing} means nothing to it"
            )
    return found


def _masked(opened: Opened) -> bool:
    """Whether its documents have masks, so that they are packed."""
    return (
        opened.learns_answers
        if isinstance(opened, StreamedDataset)
        else not isinstance(opened, IndexedDataset)
    )


def _check_flags(data: DataConfig, opened: Sequence[tuple[float, Opened]]) -> None:
    """Raises `UserError` for a flag that means nothing to any of the data."""
    kinds = {
        StreamedDataset: ("data that are tokenized in training", hf_dataset.FLAGS),
        InternEvoDataset: ("InternEvo's data", ("min_length",)),
    }
    for kind, (whose, names) in kinds.items():
        for name in () if any(isinstance(one, kind) for _, one in opened) else names:
            if getattr(data, name) != getattr(DataConfig, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is for {whose}, and there are none here; leave it out"
                )
    if data.packing and not any(_masked(one) for _, one in opened):
        unpacked = " (--no-pack)" if data.packing == "none" else ""
        raise UserError(
            f"--packing {data.packing}{unpacked} is for data with masks, and these are plain text; leave it out"
        )
    if data.max_segment_length and not any(
        isinstance(one, MaskedPair | InternEvoDataset) for _, one in opened
    ):
        raise UserError(
            f"--max-segment-length {data.max_segment_length} is for InternEvo's packings of .bin files; leave it out"
        )


def _samples(
    opened: Sequence[tuple[float, Opened]], name: str, data: DataConfig, seed: int, vocab_size: int
) -> BlendedSamples:
    return BlendedSamples(
        [_source(one, name, data, seed) for _, one in opened], [weight for weight, _ in opened], vocab_size
    )


def _source(opened: Opened, name: str, data: DataConfig, seed: int) -> SampleSource:
    if isinstance(opened, StreamedDataset):
        return opened.source(split_range(data.split, name, len(opened)), name, data, seed)
    if isinstance(opened, IndexedDataset):
        return TextSamples(opened, split_range(data.split, name, len(opened)), name, data, seed)
    parts = [
        start + np.array(split_range(data.split, name, stop - start), int)
        for start, stop in pairwise(opened.files)
    ]
    chosen = np.concatenate(parts)
    pack = packer(data, CUT if isinstance(opened, InternEvoDataset) else "first-fit")
    return PackedSamples(
        opened, chosen, data.seq_length, pack, seed, describe_split(data, name, len(chosen), len(opened))
    )


def micro_batches(
    samples: BlendedSamples,
    consumed: int,
    global_batch: int,
    micro_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> list[Batch]:
    """The micro-batches of one data-parallel rank, of the global batch that begins after `consumed` samples.

    As in Megatron, one round of micro-batches over all ranks is a run of successive samples; so the ranks together always
    have samples consumed ... consumed + global_batch - 1.
    """
    if global_batch % (micro_batch * dp_size):
        raise UserError(
            f"--global-batch-size {global_batch} is not a multiple of micro batch {micro_batch} x {dp_size} ranks"
        )
    starts = micro_batch_starts(consumed, global_batch, micro_batch, dp_rank, dp_size)
    return [
        _stack([samples.sample(number) for number in range(start, start + micro_batch)]) for start in starts
    ]


def micro_batch_starts(
    consumed: int, global_batch: int, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
) -> range:
    """The first sample of each of a rank's micro-batches."""
    return range(consumed + dp_rank * micro_batch, consumed + global_batch, micro_batch * dp_size)


def _stack(samples: Sequence[Sample]) -> Batch:
    return Batch(*(torch.stack(column) for column in zip(*samples, strict=True)))


def parse_blend(data_path: Sequence[str]) -> list[tuple[float, str]]:
    """`--data-path`: one prefix, or weights and prefixes -> [(weight, prefix)]."""
    if len(data_path) == 1:
        return [(1.0, data_path[0])]
    if not data_path or len(data_path) % 2:
        raise UserError(
            f"--data-path takes one prefix, or weights and prefixes (0.3 a 0.7 b), not {' '.join(data_path) or 'nothing'}"
        )
    blend = [(_weight(word), prefix) for word, prefix in zip(data_path[::2], data_path[1::2], strict=True)]
    smallest = min(blend)
    if smallest[0] * PERIOD < sum(weight for weight, _ in blend):
        raise UserError(
            f"--data-path: the weight {smallest[0]} of {smallest[1]} is less than 1/{PERIOD} of all weights"
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


def open_dataset(path: str, data: DataConfig, vocab_size: int) -> Opened:
    """What --data-path names, checked: whole, belonging together, with ids that the vocabulary has."""
    pairs = pairs_of(path)
    if not pairs and internevo.find_files(path):
        found = InternEvoDataset(path, data.min_length, vocab_size)
        logger.info(found.note)
        return found
    if not pairs and (files := hf_dataset.find_files(path)):
        return StreamedDataset(path, files, data)
    pair = MaskedPair(path, *pairs) if len(pairs) > 1 else None
    tokens = pair.tokens if pair else check_pair(path)
    facts = dataset_facts(path)
    if facts.get("tokens") == tokens and facts["max_token"] >= vocab_size:
        raise UserError(_foreign(path, facts["max_token"], vocab_size))
    return pair or IndexedDataset(path)


def dataset_files(path: str) -> list[Path]:
    """All files of what --data-path names."""
    if pairs := pairs_of(path):
        return [pair_file(prefix, suffix) for prefix in pairs for suffix in ("bin", "idx")]
    found = [part for one in internevo.find_files(path) for part in (one, Path(f"{one}{internevo.META}"))]
    return found or hf_dataset.find_files(path) or [pair_file(path, "bin"), pair_file(path, "idx")]


def dataset_facts(path: str) -> dict[str, Any]:
    """What preprocessing wrote about the data of `--data-path`; empty where it wrote nothing."""
    pairs = pairs_of(path)
    return read_facts(pairs[0]) if pairs else {}


def pairs_of(path: str) -> tuple[str, ...]:
    """Prefixes of the .bin/.idx pairs that a path means; none when it means none, or nothing."""
    return masked_pair.find_pairs(path) or ((path,) if pair_file(path, "idx").is_file() else ())


def _foreign(prefix: str, number: int, vocab_size: int) -> str:
    return f"{prefix} has the token id {number}, but the model's vocabulary has {vocab_size} ids; was another tokenizer used?"
