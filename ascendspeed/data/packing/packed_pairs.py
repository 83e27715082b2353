"""Samples of preference pairs, one or more to a row."""

import numpy as np
import torch

from ascendspeed.data.document import Documents
from ascendspeed.data.packing.base import Packer
from ascendspeed.data.packing.packed_dataset import PackedSamples
from ascendspeed.data.packing.rows import PairSample, assemble_pairs
from ascendspeed.utils.errors import UserError


class PackedPairs(PackedSamples):
    """Rows of preference pairs; every row holds whole pairs."""

    reference: np.ndarray | None = None
    """[pairs of the dataset, 2] fp32: log-probabilities of both answers under the reference weights; None:
    samples have none."""

    def set_reference(self, logprobs: np.ndarray, origin: str) -> None:
        """Adds reference log-probabilities to the samples. Raises `UserError` if those of a pair are
        missing."""
        used = self._numbers[self._packing.documents]
        missing = int(np.isnan(logprobs[used]).any(1).sum())
        if missing:
            raise UserError(
                f"{origin} lacks {missing:,} pairs, as it was computed with a shorter --seq-length; remove "
                "it, and "
                "a new run computes it again"
            )
        self.reference = logprobs

    def repacked(self, packer: Packer) -> "PackedPairs":
        """Returns rows of all pairs of the dataset, whatever their split."""
        return PackedPairs(
            self._documents, range(len(self._documents.lengths)), self._row_length, packer, self._seed
        )

    @property
    def documents(self) -> Documents:
        """All pairs of the dataset."""
        return self._documents

    def pairs_of(self, number: int) -> np.ndarray:
        """Numbers of the pairs in row `number` of the packing, in order."""
        packing = self._packing
        return self._numbers[packing.documents[slice(*packing.bounds[number : number + 2])]]

    def _losses(self) -> list[tuple[int, str]]:
        return [
            (
                self.without_answers,
                f"{self.without_answers:,} left out, as chosen and rejected together exceed --seq-length "
                f"{self._row_length}",
            ),
            (self.unsupervised, f"{self.unsupervised:,} left out, as an answer has no token"),
        ]

    def row(self, number: int) -> PairSample:
        """Returns row `number` of the packing."""
        return self._row(number)

    def _row(self, number: int) -> PairSample:
        pairs = self.pairs_of(number)
        row = assemble_pairs([self._documents.document(int(pair)) for pair in pairs], self._row_length)
        if self.reference is None:
            return row
        return row._replace(reference=torch.from_numpy(self.reference[pairs].reshape(-1)))
