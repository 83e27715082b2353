"""Documents that lie side by side in a row: where each begins and ends, and how its positions are turned.

Position ids [b, s] that begin again at 0 at every document say all of it. `attention.py` lets a document see nothing but itself;
here it is turned by its own positions - under dynamic NTK with the base of its own length - as if it were alone.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ascendspeed.distributed.device import SequenceBounds
from ascendspeed.models.gpt.context_parallel import WHOLE_SEQUENCE, SequenceShard
from ascendspeed.models.gpt.rope import Rope
from ascendspeed.utils.errors import UserError


class QueryBlock(NamedTuple):
    """Queries of one segment that a rank has, one after the other."""

    sequence: int
    """Which of the row's segments."""
    first: int
    """The first one's position in its segment."""
    count: int


@dataclass(eq=False)
class PackedSequences(PackedSeqParams):
    """The segments of a batch [b, s]; megatron-core hands it, as it is, to every layer's attention.

    Megatron-core would unpack what calls itself "thd"; this calls itself "sbhd", and is left alone.
    """

    qkv_format: str = "sbhd"
    lengths: tuple[tuple[int, ...], ...] = ()
    """Of the segments of every row; each row's sum is s."""
    positions: Tensor | None = None
    """The position ids [b, s] of whole rows, on the CPU."""
    _turns: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _bounds: dict[torch.device, SequenceBounds] = field(default_factory=dict, repr=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(map(max, self.lengths))

    def bounds(self, device: torch.device) -> SequenceBounds:
        """Of all segments, the rows laid one after the other."""
        if device not in self._bounds:
            ends = list(accumulate(n for row in self.lengths for n in row))
            self._bounds[device] = SequenceBounds(
                ends, torch.tensor([0, *ends], dtype=torch.int32, device=device), self.longest
            )
        return self._bounds[device]

    def cos_sin(
        self, rope: Rope, dtype: torch.dtype, device: torch.device, share: SequenceShard = WHOLE_SEQUENCE
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [s, b, 1, d] of the positions that `share` has; made once, for all layers."""
        key = (dtype, device, share)
        if key not in self._turns:
            positions = share.take(self.positions, 1).t().float().to(device)
            self._turns[key] = rope.cos_sin(positions, self._frequencies(rope, share).to(device), dtype)
        return self._turns[key]

    def _frequencies(self, rope: Rope, share: SequenceShard) -> Tensor:
        """[1, d/2] where all segments have the same, else of every position that `share` has: [s, b, d/2]."""
        of = {n: rope.inverse_frequencies(n) for n in {n for row in self.lengths for n in row}}
        first = next(iter(of.values()))
        if all(torch.equal(first, other) for other in of.values()):
            return first[None]
        rows = [torch.cat([of[n].expand(n, -1) for n in row]) for row in self.lengths]
        return share.take(torch.stack(rows, 1), 0)

    def query_blocks(self, row: int, share: SequenceShard = WHOLE_SEQUENCE) -> list[QueryBlock]:
        """The queries of a row that `share` has, in the order in which it has them."""
        whole, found = sum(self.lengths[row]), []
        chunk = whole // len(share.chunk_starts(whole)) // share.size
        for first in share.chunk_starts(whole):
            begin = 0
            for i, n in enumerate(self.lengths[row]):
                start, stop = max(begin, first), min(begin + n, first + chunk)
                if start < stop:
                    found.append(QueryBlock(i, start - begin, stop - start))
                begin += n
        return found


def packed_sequences_of(position_ids: Tensor) -> PackedSequences | None:
    """The segments of a batch, from its position ids [b, s]; None where every row is one document.

    Raises `UserError` for position ids that do not count up from 0.
    """
    length = position_ids.size(1)
    begins = position_ids == 0
    place = torch.arange(length, device=position_ids.device).expand_as(position_ids)
    expected = place - (place * begins).cummax(1).values
    if not (position_ids == expected).all():
        row, column = (position_ids != expected).nonzero()[0].tolist()
        raise UserError(
            f"position ids must count up, from 0 where a document begins: row {row} of the batch has "
            f"{int(position_ids[row, column])} at {column}, not {int(expected[row, column])}"
        )
    if int(begins.sum()) == len(begins):
        return None
    end = torch.tensor([length])
    lengths = tuple(tuple(row.nonzero().flatten().diff(append=end).tolist()) for row in begins)
    return PackedSequences(lengths=lengths, positions=position_ids)
