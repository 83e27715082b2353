"""Plain text in one Megatron .bin/.idx pair: documents are concatenated and split into samples, as in
pre-training."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.indexed.epoch import EpochDataset
from ascendspeed.data.indexed.megatron_pair import check_pair, pair_file, read_facts
from ascendspeed.data.packing.rows import Sample
from ascendspeed.data.readers.discovery import CACHE_FOLDER
from ascendspeed.data.splits import describe_split, split_range
from ascendspeed.data.token_dataset import TokenDataset, check_max_token
from ascendspeed.utils.errors import UserError


class TextPair(TokenDataset):
    """A Megatron pair; every token is supervised."""

    description = "plain text in .bin/.idx files"
    has_loss_mask = False

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._indexed = IndexedDataset(prefix)

    @classmethod
    def match(cls, path: str) -> bool:
        return pair_file(path, "idx").is_file()

    @classmethod
    def open(cls, path: str, data: DataConfig, vocab_size: int) -> Self:
        check_max_token(path, cls.facts(path), check_pair(path), vocab_size)
        return cls(path)

    @classmethod
    def files(cls, path: str) -> list[Path]:
        return [pair_file(path, "bin"), pair_file(path, "idx")]

    @classmethod
    def facts(cls, path: str) -> dict[str, Any]:
        return read_facts(path) if cls.match(path) else {}

    def samples(self, split: str, data: DataConfig, seed: int) -> "TextSamples":
        documents = split_range(data.split, split, len(self._indexed))
        return TextSamples(self._indexed, documents, split, data, seed)


class TextSamples:
    """Samples of the concatenated documents of one split: a `SampleSource`."""

    note = ""
    estimated = False

    def __init__(
        self, indexed: IndexedDataset, documents: range, split: str, data: DataConfig, seed: int
    ) -> None:
        """`documents` are those of the split. Raises `UserError` if they do not fill one sample."""
        self.prefix = indexed.path_prefix
        self._indexed = indexed
        self._split = Split[split]
        self._seq_length = data.seq_length
        self._cache = Path(data.data_cache_path or Path(self.prefix).parent / CACHE_FOLDER)
        self._seed = seed
        self._documents = np.arange(documents.start, documents.stop, dtype=np.int32)
        tokens = int(indexed.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
        self.samples_per_epoch = max(0, tokens - 1) // data.seq_length
        if not self.samples_per_epoch:
            raise UserError(
                f"{self.prefix}: {describe_split(data, split, len(documents), len(indexed))} with {tokens} "
                "tokens, "
                f"and one sample of --seq-length {data.seq_length} takes {data.seq_length + 1}"
            )
        self._epochs: dict[int, EpochDataset] = {}

    def sample(self, number: int) -> Sample:
        """Returns sample `number` >= 0; numbers beyond an epoch continue in the next one."""
        epoch, index = divmod(number, self.samples_per_epoch)
        item = self._epoch(epoch)[index]
        return item["tokens"], item["labels"], item["loss_mask"], item["position_ids"]

    def _epoch(self, number: int) -> EpochDataset:
        if number not in self._epochs:  # keep the previous epoch: a batch may cross the boundary
            self._epochs = {n: epoch for n, epoch in self._epochs.items() if n == number - 1}
            self._epochs[number] = EpochDataset(
                self._indexed,
                self._documents,
                self._split,
                self._seq_length,
                self._seed + number,
                self._cache,
            )
        return self._epochs[number]
