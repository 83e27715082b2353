"""Preference pairs on disk: a masked pair of .bin/.idx files of which every second document is a chosen
conversation, followed by the rejected one.

`P_preference_input_ids_document` holds the ids and `P_preference_labels_document` the labels, as
`masked_pair` describes them.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document, Supervision
from ascendspeed.data.indexed.masked_pair import (
    INSTRUCTION,
    PREFERENCE,
    MaskedPair,
    existing_pairs,
    find_pairs,
)
from ascendspeed.data.indexed.megatron_pair import pair_file, read_facts
from ascendspeed.data.token_dataset import SampleSource, TokenDataset, check_max_token
from ascendspeed.utils.errors import UserError

PACKINGS = ("none", "first-fit")
"""Values of `--packing` for pairs."""


class PreferencePairs(TokenDataset):
    """Pairs of a chosen and a rejected conversation, each pair one document: `Documents` and a
    `TokenDataset`."""

    description = "preference pairs in .bin/.idx files"
    has_loss_mask = True
    holds_pairs = True

    def __init__(self, prefix: str, ids: str, labels: str, last_token: int | None = None) -> None:
        """`last_token` is put behind every conversation. Raises `UserError` unless the files belong together
        and hold whole pairs."""
        self.prefix = prefix
        self._last_token = last_token
        self._conversations = MaskedPair(prefix, ids, labels)
        lengths = self._conversations.lengths
        if len(lengths) % 2:
            raise UserError(
                f"{prefix}: {len(lengths):,} conversations are not pairs of a chosen and a rejected one; "
                "preprocess again"
            )
        self.lengths = lengths.reshape(-1, 2).sum(1) + (0 if last_token is None else 2)
        self.file_bounds = np.array([0, len(self.lengths)], np.int64)

    @classmethod
    def match(cls, path: str) -> bool:
        found = find_pairs(path, PREFERENCE)
        if found and find_pairs(path) not in (None, found):
            raise UserError(
                f"{path} names instruction data and preference pairs; give {path}_{INSTRUCTION} or "
                f"{path}_{PREFERENCE}"
            )
        return found is not None

    @classmethod
    def open(cls, path: str, data: DataConfig, vocab_size: int) -> Self:
        dataset = cls(path, *existing_pairs(path, PREFERENCE), data.reward_token_id)
        check_max_token(path, cls.facts(path), dataset._conversations.tokens, vocab_size)
        return dataset

    @classmethod
    def files(cls, path: str) -> list[Path]:
        prefixes = existing_pairs(path, PREFERENCE)
        return [pair_file(prefix, suffix) for prefix in prefixes for suffix in ("bin", "idx")]

    @classmethod
    def facts(cls, path: str) -> dict[str, Any]:
        return read_facts(existing_pairs(path, PREFERENCE)[0])

    def samples(self, split: str, data: DataConfig, seed: int) -> SampleSource:
        from ascendspeed.data.packing.algorithms import OnePerRow  # writing needs no torch
        from ascendspeed.data.packing.packed_dataset import packed_samples
        from ascendspeed.data.packing.packed_pairs import PackedPairs

        if data.packing not in (None, *PACKINGS):
            raise UserError(
                f"--packing {data.packing} splits documents; preference pairs take {' or '.join(PACKINGS)}"
            )
        return packed_samples(self, split, data, seed, OnePerRow, PackedPairs)

    def document(self, number: int) -> Document:
        """Returns a pair. Raises `UserError` for damaged labels."""
        pair = Document.of_pair(*(self._conversations.document(2 * number + which) for which in (0, 1)))
        return pair if self._last_token is None else pair.ended_by(self._last_token)

    def supervision(self, numbers: np.ndarray, length: int) -> Supervision:
        """Counts supervised tokens; 0 for a pair that does not fit into `length` or that lacks an answer."""
        longest = int(self._conversations.lengths.max())
        tokens = self._conversations.supervision(np.arange(2 * len(self)), longest).tokens
        tokens = tokens.reshape(-1, 2)[numbers]
        usable = (self.lengths[numbers] <= length) & (tokens > 0).all(1)
        nothing = np.zeros(len(numbers), np.int64)
        return Supervision(np.where(usable, tokens.sum(1), 0), nothing, nothing)

    def __len__(self) -> int:
        return len(self.lengths)
