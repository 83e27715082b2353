"""Samples of indexed documents with loss masks, packed several to a row."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Documents, Truncation
from ascendspeed.data.packing.base import Packer, Packing, concatenate
from ascendspeed.data.packing.registry import create_packer
from ascendspeed.data.packing.rows import Sample, assemble_row
from ascendspeed.data.splits import describe_split, split_range
from ascendspeed.utils.errors import UserError


def packed_samples(
    documents: Documents,
    split: str,
    data: DataConfig,
    seed: int,
    default: type[Packer],
    kind: "type[PackedSamples] | None" = None,
) -> "PackedSamples":
    """Packs the documents of one split by `--packing`; every file is divided by `--split` on its own."""
    selected = []
    for start, stop in pairwise(documents.file_bounds):
        selected.append(start + np.array(split_range(data.split, split, stop - start), int))
    numbers = np.concatenate(selected)
    description = describe_split(data, split, len(numbers), len(documents.lengths))
    packer = create_packer(data, default)
    return (kind or PackedSamples)(documents, numbers, data.seq_length, packer, seed, description)


class PackedSamples:
    """Rows of one dataset's documents in one split: a `SampleSource`.

    The documents are packed once, in an order given by the run's seed; every epoch shuffles the rows.
    """

    estimated = False

    def __init__(
        self,
        documents: Documents,
        numbers: Sequence[int] | np.ndarray,
        row_length: int,
        packer: Packer,
        seed: int,
        description: str = "",
    ) -> None:
        """Packs the documents `numbers`, which errors call `description`. Raises `UserError` if no row
        results."""
        self.prefix = documents.prefix
        self._documents = documents
        self._row_length = row_length
        self._packer = packer
        self._seed = seed
        self.truncated = Truncation()
        self.without_answers = 0
        self.unsupervised = 0
        self.dropped_tokens = 0
        self.supervised_tokens: int | None = 0
        numbers = np.asarray(numbers, np.int64)
        groups = [numbers]
        if packer.per_file:
            groups = np.split(numbers, np.searchsorted(numbers, documents.file_bounds[1:-1]))
        packed = [self._pack(group) for group in groups]
        self._numbers = np.concatenate([order for order, _ in packed])
        self._packing = concatenate([packing for _, packing in packed], [len(order) for order, _ in packed])
        self.samples_per_epoch = len(self._packing)
        if not self.samples_per_epoch:
            reason = f"; none fills a row or has a supervised token at --seq-length {row_length}"
            split = description or f"{len(numbers)} documents"
            raise UserError(f"{self.prefix}: {split}{reason if len(numbers) else ''}")
        self._orders: dict[int, np.ndarray] = {}

    def _pack(self, group: np.ndarray) -> tuple[np.ndarray, Packing]:
        """Shuffles and packs documents; returns their numbers in packing order, and the rows."""
        packer = self._packer
        seed = self._seed if packer.seed is None else packer.seed
        numbers = np.random.RandomState(seed).permutation(group)
        lengths = np.asarray(self._documents.lengths)[numbers].astype(np.int64)
        keep = lengths > 0 if packer.splits_documents else self._select_supervised(numbers, lengths)
        numbers = numbers[keep]
        lengths = lengths[keep]
        packing = packer.pack(lengths, self._row_length)
        if packer.splits_documents:
            self.dropped_tokens += int(lengths.sum()) - packing.tokens
        return numbers, packing

    def _select_supervised(self, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Mask [documents] bool of the documents with a supervised token in a row; counts what the others
        lose."""
        supervision = self._documents.supervision(numbers, self._row_length)
        long = lengths > self._row_length
        keep = supervision.tokens > 0
        self.without_answers += int((long & ~keep).sum())
        self.unsupervised += int((~long & ~keep).sum())
        self.truncated += Truncation(
            int((long & keep).sum()),
            int(supervision.lost_answers[keep].sum()),
            int(supervision.cut_answers[keep].sum()),
        )
        if not supervision.exact:
            self.supervised_tokens = None
        elif self.supervised_tokens is not None:
            self.supervised_tokens += int(supervision.tokens.sum())
        return keep

    @property
    def filled(self) -> float:
        """Fraction of all positions that hold tokens of documents."""
        return self._packing.tokens / (len(self._packing) * self._row_length)

    @property
    def note(self) -> str:
        """One log line: rows, fill rate, supervised tokens and losses."""
        rows = f"{len(self._numbers):,} documents in {len(self._packing):,} rows of {self._row_length} tokens"
        supervised = ""
        if self.supervised_tokens:
            supervised = f", {self.supervised_tokens:,} of {self._packing.tokens:,} tokens in the loss"
        losses = self._losses()
        reported = [description for count, description in losses if count]
        return "; ".join([f"{self.prefix}: {rows}, {self.filled:.1%} filled{supervised}", *reported])

    def _losses(self) -> list[tuple[int, str]]:
        """Counts of documents and tokens that are not trained on, with their description."""
        return [
            (self.truncated.documents, self.truncated.describe(self._row_length)),
            (self.without_answers, f"{self.without_answers:,} left out, as nothing of their answers fits"),
            (self.unsupervised, f"{self.unsupervised:,} left out, as they have no supervised token"),
            (self.dropped_tokens, f"{self.dropped_tokens:,} tokens left out, as they fill no row"),
        ]

    def sample(self, number: int) -> Sample:
        """Returns sample `number` >= 0; numbers beyond an epoch continue in the next one."""
        epoch, index = divmod(number, self.samples_per_epoch)
        return self._row(int(self._order(epoch)[index]))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:  # keep the previous epoch: a batch may cross the boundary
            self._orders = {number: order for number, order in self._orders.items() if number == epoch - 1}
            self._orders[epoch] = np.random.RandomState(self._seed + epoch).permutation(len(self._packing))
        return self._orders[epoch]

    def _row(self, number: int) -> Sample:
        packing = self._packing
        selected = slice(*packing.bounds[number : number + 2])
        parts = []
        for index, start, stop in zip(
            packing.documents[selected],
            packing.starts[selected].tolist(),
            packing.stops[selected].tolist(),
            strict=True,
        ):
            parts.append((self._documents.document(int(self._numbers[index])), start, stop))
        return assemble_row(
            parts, self._row_length, self._packer.predicts_across_rows, self._packer.position_period
        )
