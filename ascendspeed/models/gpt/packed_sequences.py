"""Packed sequences: several documents in one row, their boundaries, and rotary positions that restart in
every document.

Position ids [b, s] that restart at 0 describe the packing. `attention.py` restricts attention to the
document; the rotary embedding of a document uses its own positions, and under dynamic NTK the base of its own
length, as if it were alone in the row.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ascendspeed.distributed.training_kernels import SequenceBounds
from ascendspeed.models.gpt.rope import Rope
from ascendspeed.models.gpt.sequence_shard import WHOLE_SEQUENCE, SequenceShard
from ascendspeed.utils.errors import UserError


class QueryBlock(NamedTuple):
    """Consecutive queries of one packed sequence that a rank holds."""

    sequence: int
    """Index of the sequence in its row."""
    first: int
    """Position of the first query in its sequence."""
    length: int
    """Number of queries."""


@dataclass(eq=False)
class PackedSequences(PackedSeqParams):
    """Packed sequences of a batch [b, s]. Megatron-core hands this object unchanged to the attention of every
    layer.

    Megatron-core would unpack a batch of format "thd"; the format "sbhd" is left alone.
    """

    qkv_format: str = "sbhd"
    lengths: tuple[tuple[int, ...], ...] = ()
    """Lengths of the sequences of every row; each row sums to s."""
    positions: Tensor | None = None
    """Position ids [b, s] of full rows, on the CPU."""
    _cos_sin: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _bounds: dict[torch.device, SequenceBounds] = field(default_factory=dict, repr=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(max, self.lengths))

    def bounds(self, device: torch.device) -> SequenceBounds:
        """Boundaries of all sequences, with the rows one after the other."""
        if device not in self._bounds:
            ends = list(accumulate(n for row in self.lengths for n in row))
            cumulative = torch.tensor([0, *ends], dtype=torch.int32, device=device)
            self._bounds[device] = SequenceBounds(ends, cumulative, self.longest)
        return self._bounds[device]

    def cos_sin(
        self, rope: Rope, dtype: torch.dtype, device: torch.device, share: SequenceShard = WHOLE_SEQUENCE
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [s, b, 1, d] for the positions in `share`; computed once for all layers."""
        key = (dtype, device, share)
        if key not in self._cos_sin:
            positions = share.take(self.positions, 1).t().float().to(device)
            frequencies = self._frequencies(rope, share).to(device)
            self._cos_sin[key] = rope.cos_sin(positions, frequencies, dtype)
        return self._cos_sin[key]

    def _frequencies(self, rope: Rope, share: SequenceShard) -> Tensor:
        """[1, d/2] if all sequences have equal frequencies, else those of every position in `share`: [s, b,
        d/2]."""
        lengths = {n for row in self.lengths for n in row}
        by_length = {n: rope.inverse_frequencies(n) for n in lengths}
        first = next(iter(by_length.values()))
        if all(torch.equal(first, other) for other in by_length.values()):
            return first[None]
        rows = [torch.cat([by_length[n].expand(n, -1) for n in row]) for row in self.lengths]
        return share.take(torch.stack(rows, 1), 0)

    def query_blocks(self, row: int, share: SequenceShard = WHOLE_SEQUENCE) -> list[QueryBlock]:
        """The queries of a row in `share`, in the order in which the rank holds them."""
        row_length = sum(self.lengths[row])
        chunk_starts = share.chunk_starts(row_length)
        chunk = row_length // len(chunk_starts) // share.size
        blocks = []
        for chunk_start in chunk_starts:
            sequence_start = 0
            for i, length in enumerate(self.lengths[row]):
                start = max(sequence_start, chunk_start)
                stop = min(sequence_start + length, chunk_start + chunk)
                if start < stop:
                    blocks.append(QueryBlock(i, start - sequence_start, stop - start))
                sequence_start += length
        return blocks


def packed_sequences_of(position_ids: Tensor) -> PackedSequences | None:
    """The packed sequences of a batch with position ids [b, s]; None if every row is one document.

    Raises `UserError` for position ids that do not count up from 0.
    """
    length = position_ids.size(1)
    starts = position_ids == 0
    index = torch.arange(length, device=position_ids.device).expand_as(position_ids)
    expected = index - (index * starts).cummax(1).values
    if not (position_ids == expected).all():
        row, column = (position_ids != expected).nonzero()[0].tolist()
        raise UserError(
            f"position ids must count up, from 0 where a document begins: row {row} of the batch has "
            f"{int(position_ids[row, column])} at {column}, not {int(expected[row, column])}"
        )
    if int(starts.sum()) == len(starts):
        return None
    end = torch.tensor([length])
    lengths = tuple(tuple(row.nonzero().flatten().diff(append=end).tolist()) for row in starts)
    return PackedSequences(lengths=lengths, positions=position_ids)
