"""Documents -> rows of several documents, as samples without end.

A document of n tokens takes n positions of a row; the label of a position is the document's next token where that is to be learnt,
and its last position never counts. Position ids begin at 0 with every document, and that alone says where one begins: attention
reads it off there. What is not filled at the end of a row is one more segment in which nothing counts.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ascendspeed.data.document import Document, Documents, Truncation
from ascendspeed.data.packing.algorithms import Packer, Packing, concatenate
from ascendspeed.utils.errors import UserError

Sample = tuple[Tensor, Tensor, Tensor, Tensor]
"""tokens, labels, loss_mask, position_ids, each [s]; int64, but the mask float32."""


class PackedSamples:
    """The rows of one origin's documents in one split. They are packed once, by the run's seed; an epoch shuffles the rows."""

    estimated = False

    def __init__(
        self,
        documents: Documents,
        chosen: Sequence[int] | np.ndarray,
        seq_length: int,
        pack: Packer,
        seed: int,
        said: str = "",
    ) -> None:
        """`chosen`: the documents of the split, `said` in messages. Raises `UserError` if none of them fills a row."""
        self.prefix = documents.prefix
        self._documents, self._seq_length, self._pack, self._seed = documents, seq_length, pack, seed
        chosen, self.truncated = np.asarray(chosen, np.int64), Truncation()
        self.beyond = self.unlearnt = self.unfilled = 0
        self.learnt: int | None = 0
        edges = np.searchsorted(chosen, documents.files[1:-1]) if pack.apart else []
        found = [self._packed(part) for part in np.split(chosen, edges)]
        self._numbers = np.concatenate([numbers for numbers, _ in found])
        self._packing = concatenate([packing for _, packing in found], [len(numbers) for numbers, _ in found])
        self.samples_per_epoch = len(self._packing)
        if not self.samples_per_epoch:
            why = f", of which none can be learnt from at --seq-length {seq_length}" if len(chosen) else ""
            raise UserError(f"{self.prefix}: {said or f'{len(chosen)} documents'}{why}")
        self._orders: dict[int, np.ndarray] = {}

    def _packed(self, chosen: np.ndarray) -> tuple[np.ndarray, Packing]:
        """Documents in the order of their rows, and these."""
        pack, length = self._pack, self._seq_length
        numbers = np.random.RandomState(self._seed if pack.seed is None else pack.seed).permutation(chosen)
        lengths = np.asarray(self._documents.lengths)[numbers].astype(np.int64)
        keep = lengths > 0 if pack.keeps else self._answered(numbers, lengths)
        numbers, lengths = numbers[keep], lengths[keep]
        packing = pack.pack(lengths, length)
        self.unfilled += int(lengths.sum()) - packing.tokens if pack.keeps else 0
        return numbers, packing

    @property
    def filled(self) -> float:
        """Share of all positions that documents take."""
        return self._packing.tokens / (len(self._packing) * self._seq_length)

    @property
    def note(self) -> str:
        """One line for a person."""
        lost = [
            (self.truncated.documents, self.truncated.said(self._seq_length)),
            (self.beyond, f"{self.beyond:,} left out, as nothing of their answers fits"),
            (self.unlearnt, f"{self.unlearnt:,} left out, as they hold nothing to learn"),
            (self.unfilled, f"{self.unfilled:,} tokens left out, as they fill no row"),
        ]
        rows = f"{len(self._numbers):,} documents in {len(self._packing):,} rows of {self._seq_length} tokens"
        learnt = f", {self.learnt:,} of {self._packing.tokens:,} tokens learnt" if self.learnt else ""
        return "; ".join(
            [
                f"{self.prefix}: {rows}, {self.filled:.1%} filled{learnt}",
                *(said for count, said in lost if count),
            ]
        )

    def sample(self, number: int) -> Sample:
        """Sample `number` >= 0; numbers beyond an epoch go on into the next one."""
        epoch, place = divmod(number, self.samples_per_epoch)
        return self._row(int(self._order(epoch)[place]))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {
                n: order for n, order in self._orders.items() if n == epoch - 1
            }  # a batch may reach over an edge
            self._orders[epoch] = np.random.RandomState(self._seed + epoch).permutation(len(self._packing))
        return self._orders[epoch]

    def _row(self, number: int) -> Sample:
        packing = self._packing
        found = slice(*packing.bounds[number : number + 2])
        documents = (self._documents.document(int(self._numbers[one])) for one in packing.documents[found])
        pieces = zip(documents, packing.starts[found].tolist(), packing.stops[found].tolist(), strict=True)
        return assemble_row(pieces, self._seq_length, self._pack.goes_on, self._pack.segment)

    def _answered(self, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[documents] bool: those of which a row would hold something to be learnt. What is lost of the others is counted."""
        found, long = self._documents.learnt(numbers, self._seq_length), lengths > self._seq_length
        keep = found.tokens > 0
        self.beyond += int((long & ~keep).sum())
        self.unlearnt += int((~long & ~keep).sum())
        self.truncated += Truncation(
            int((long & keep).sum()), int(found.lost[keep].sum()), int(found.cut[keep].sum())
        )
        self.learnt = (
            self.learnt + int(found.tokens.sum()) if found.exact and self.learnt is not None else None
        )
        return keep


def assemble_row(
    pieces: Iterable[tuple[Document, int, int]],
    length: int,
    goes_on: bool = False,
    segment: int | None = None,
) -> Sample:
    """(document, start, stop) one after the other as a sample of `length` positions; `goes_on` and `segment` as of a `Packer`."""
    tokens, labels, counts = (np.zeros(length, np.int64) for _ in range(3))
    positions = np.empty(length, np.int64)
    at = 0
    for document, start, stop in pieces:
        end = at + stop - start
        last = stop + 1 if goes_on else stop  # the label of the last position, if it has one
        following = document.tokens[start + 1 : last]
        learnt = slice(at, at + len(following))
        tokens[at:end], labels[learnt] = document.tokens[start:stop], following
        counts[learnt] = 1 if document.loss_mask is None else document.loss_mask[start + 1 : last]
        positions[at:end] = np.arange(stop - start)
        at = end
    positions[at:] = np.arange(length - at)
    if segment:
        positions = np.arange(length) % segment
    return (
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(counts).float(),
        torch.from_numpy(positions),
    )
