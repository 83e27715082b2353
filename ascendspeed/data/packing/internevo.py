"""InternEvo's packers: the documents of a file are concatenated and split wherever a row ends.

The documents of a file are shuffled once with a fixed seed, and tokens that do not fill the last row are
dropped. InternEvo calls a row a pack: its `packed_length` is --seq-length, and its `max_length_per_sample` is
--max-segment-length.
"""

from typing import Self

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.packing.algorithms import split_contiguous
from ascendspeed.data.packing.base import Packer, Packing
from ascendspeed.utils.errors import UserError

SEED = 1024
"""InternEvo's seed of the document order."""


class InternEvoCut(Packer):
    """Attention stays within documents, and a label looks over the end of a row."""

    name = "internevo-cut"
    uses_segment_length = True
    predicts_across_rows = True
    splits_documents = True
    per_file = True
    seed = SEED

    def __init__(self, segment: int) -> None:
        """`segment`: longest span of attention, in tokens."""
        self._segment = segment

    @classmethod
    def from_config(cls, data: DataConfig) -> Self:
        return cls(data.max_segment_length or data.seq_length)

    def pack(self, lengths: np.ndarray, row_length: int) -> Packing:
        return split_contiguous(lengths, row_length, self._segment)


class InternEvoWhole(Packer):
    """Attention crosses documents, up to --max-segment-length tokens."""

    name = "internevo-whole"
    uses_segment_length = True
    splits_documents = True
    per_file = True
    seed = SEED

    def __init__(self, segment: int) -> None:
        """`segment`: longest span of attention, in tokens."""
        self.position_period = segment

    @classmethod
    def from_config(cls, data: DataConfig) -> Self:
        segment = data.max_segment_length or data.seq_length
        if data.seq_length % segment:
            raise UserError(
                f"--packing {cls.name}: --seq-length {data.seq_length} is not a multiple of "
                f"--max-segment-length {segment}"
            )
        return cls(segment)

    def pack(self, lengths: np.ndarray, row_length: int) -> Packing:
        return split_contiguous(lengths, row_length)
