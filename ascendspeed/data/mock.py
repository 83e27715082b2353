"""Random token ids in place of data, for tests of speed and memory (`--mock-data`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ascendspeed.config.schema import MOCK_DATA, DataConfig
from ascendspeed.data.packing.rows import Sample
from ascendspeed.data.splits import SPLITS
from ascendspeed.data.token_dataset import TokenDataset

EPOCH = 1 << 20
"""Samples that count as one pass; `sample` never repeats."""


@dataclass
class MockSamples:
    """Samples of uniformly random ids: each a function of seed, split and number."""

    vocab_size: int
    length: int
    seed: int
    split: int
    prefix: str = MOCK_DATA
    samples_per_epoch: int = EPOCH
    estimated: bool = False
    note: str = ""

    def sample(self, number: int) -> Sample:
        """See `SampleSource.sample`."""
        key = np.array([self.seed, number * len(SPLITS) + self.split], np.uint64)
        ids = np.random.Generator(np.random.Philox(key=key)).integers(0, self.vocab_size, self.length + 1)
        tokens = torch.from_numpy(ids)
        return tokens[:-1], tokens[1:], torch.ones(self.length), torch.arange(self.length)


class MockDataset(TokenDataset):
    """Data that `--mock-data` names."""

    description = "mock data"
    has_loss_mask = False

    def __init__(self, vocab_size: int) -> None:
        self.prefix, self._vocab_size = MOCK_DATA, vocab_size

    @classmethod
    def match(cls, path: str) -> bool:
        """See `TokenDataset.match`."""
        return path == MOCK_DATA

    @classmethod
    def open(cls, path: str, data: DataConfig, vocab_size: int) -> Self:
        """See `TokenDataset.open`."""
        return cls(vocab_size)

    @classmethod
    def files(cls, path: str) -> list[Path]:
        """See `TokenDataset.files`."""
        return []

    def samples(self, split: str, data: DataConfig, seed: int) -> MockSamples:
        """See `TokenDataset.samples`."""
        return MockSamples(self._vocab_size, data.seq_length, seed, SPLITS.index(split))
