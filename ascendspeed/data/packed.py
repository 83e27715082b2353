"""Documents -> rows of several documents, as samples without end.

A document of n tokens takes n positions of a row; the label of a position is the document's next token where that is to be learnt,
and its last position never counts. Position ids begin at 0 with every document, and that alone says where one begins: attention
reads it off there. What is not filled at the end of a row is one more segment in which nothing counts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ascendspeed.data.document import Documents, learns_within
from ascendspeed.data.packing import Packer
from ascendspeed.errors import UserError

Sample = tuple[Tensor, Tensor, Tensor, Tensor]
"""tokens, labels, loss_mask, position_ids, each [s]; int64, but the mask float32."""


class PackedSource:
    """The rows of one origin's documents in one split. They are packed once, by the run's seed; an epoch shuffles the rows."""

    def __init__(self, documents: Documents, chosen: Sequence[int] | np.ndarray, seq_length: int, pack: Packer, seed: int) -> None:
        """`chosen`: the documents of the split. Raises `UserError` if none of them fills a row."""
        self.prefix = documents.prefix
        self._documents, self._seq_length, self._goes_on, self._seed = documents, seq_length, pack.goes_on, seed
        numbers = np.random.RandomState(seed).permutation(np.asarray(chosen, np.int64))
        lengths = np.asarray(documents.lengths)[numbers].astype(np.int64)
        keep = (lengths > 0) & ~self._unanswered(numbers, lengths)
        self._numbers, lengths = numbers[keep], lengths[keep]
        self._packing = pack.pack(lengths, seq_length)
        self.dropped = int(len(numbers) - len(lengths))
        self.truncated = 0 if self._goes_on else int((lengths > seq_length).sum())
        self.samples_per_epoch = len(self._packing)
        if not self.samples_per_epoch:
            raise UserError(
                f"{self.prefix}: of the {len(numbers)} documents that --split gives to a split here, "
                f"none can be learnt from at --seq-length {seq_length}"
            )
        self._orders: dict[int, np.ndarray] = {}

    @property
    def filled(self) -> float:
        """Share of all positions that documents take."""
        return self._packing.tokens / (len(self._packing) * self._seq_length)

    @property
    def note(self) -> str:
        """One line for a person."""
        lost = [
            (self.truncated, f"cut to --seq-length {self._seq_length}"),
            (self.dropped, "left out, as nothing of their answers fits"),
        ]
        said = "".join(f", {count:,} {why}" for count, why in lost if count)
        rows = f"{len(self._numbers):,} documents in {len(self._packing):,} rows of {self._seq_length} tokens"
        return f"{self.prefix}: {rows}, {self.filled:.1%} filled{said}"

    def sample(self, number: int) -> Sample:
        """Sample `number` >= 0; numbers beyond an epoch go on into the next one."""
        epoch, place = divmod(number, self.samples_per_epoch)
        return self._row(int(self._order(epoch)[place]))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {n: order for n, order in self._orders.items() if n == epoch - 1}  # a batch may reach over an edge
            self._orders[epoch] = np.random.RandomState(self._seed + epoch).permutation(len(self._packing))
        return self._orders[epoch]

    def _row(self, number: int) -> Sample:
        packing, length = self._packing, self._seq_length
        tokens, labels, counts = (np.zeros(length, np.int64) for _ in range(3))
        positions = np.empty(length, np.int64)
        at = 0
        for piece in range(*packing.bounds[number : number + 2]):
            start, stop = int(packing.starts[piece]), int(packing.stops[piece])
            document = self._documents.document(int(self._numbers[packing.documents[piece]]))
            end = at + stop - start
            last = stop + 1 if self._goes_on else stop  # the label of the last position, if it has one
            following = document.tokens[start + 1 : last]
            learnt = slice(at, at + len(following))
            tokens[at:end], labels[learnt] = document.tokens[start:stop], following
            counts[learnt] = 1 if document.loss_mask is None else document.loss_mask[start + 1 : last]
            positions[at:end] = np.arange(stop - start)
            at = end
        positions[at:] = np.arange(length - at)
        return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(counts).float(), torch.from_numpy(positions)

    def _unanswered(self, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[documents] bool: those of which a row would hold nothing that is to be learnt. Only long ones can be, and are read."""
        found = np.zeros(len(numbers), bool)
        for place in [] if self._goes_on else np.flatnonzero(lengths > self._seq_length):
            mask = self._documents.document(int(numbers[place])).loss_mask
            found[place] = not learns_within(mask, self._seq_length)
        return found
