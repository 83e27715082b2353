"""`Document`, the `Documents` protocol, and `Fault`: the reason why a row was skipped."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Document:
    """Token ids of one document and, for instruction data, its loss mask."""

    tokens: np.ndarray
    """Ids [n] int32."""
    loss_mask: np.ndarray | None = None
    """[n] bool, False where a token is not supervised; None: all tokens are supervised."""
    rejected_start: int | None = None
    """Index of the first token of the rejected conversation, if the document is a preference pair: the chosen
    conversation followed by the rejected one. None: not a pair."""

    @classmethod
    def of_pair(cls, chosen: "Document", rejected: "Document") -> "Document":
        """Joins two conversations with loss masks to a preference pair."""
        assert chosen.loss_mask is not None
        assert rejected.loss_mask is not None
        return cls(
            np.concatenate([chosen.tokens, rejected.tokens]),
            np.concatenate([chosen.loss_mask, rejected.loss_mask]),
            len(chosen.tokens),
        )

    def parts(self) -> list["Document"]:
        """Returns the chosen and the rejected conversation of a pair; of another document itself."""
        at = self.rejected_start
        if at is None:
            return [self]
        assert self.loss_mask is not None
        return [
            Document(self.tokens[:at], self.loss_mask[:at]),
            Document(self.tokens[at:], self.loss_mask[at:]),
        ]

    def ended_by(self, token: int) -> "Document":
        """Returns a preference pair with a token behind either conversation, which is not supervised."""
        parts = []
        for part in self.parts():
            assert part.loss_mask is not None
            tokens = np.append(part.tokens, np.int32(token))
            parts.append(Document(tokens, np.append(part.loss_mask, False)))
        return Document.of_pair(*parts)


@dataclass(frozen=True)
class Fault:
    """Reason why a row gives no document."""

    kind: str
    """Category under which the row is counted."""
    detail: str = ""
    """Description of this row's error."""

    def __str__(self) -> str:
        return f"{self.detail} ({self.kind})" if self.detail else self.kind


class Documents(Protocol):
    """Documents of one dataset, by number."""

    prefix: str
    """Path as the user gave it, for messages."""
    lengths: np.ndarray
    """Number of ids of every document, [documents] of an integer type."""
    file_bounds: np.ndarray
    """First document of every file, then the number of documents: [files + 1] int64."""

    def document(self, number: int) -> Document:
        """Returns the whole document `number`. Raises `UserError` if it is damaged."""

    def supervision(self, numbers: np.ndarray, length: int) -> "Supervision":
        """Counts supervised tokens among the first `length` tokens of each of the documents `numbers`."""


@dataclass(frozen=True)
class Truncation:
    """Losses of documents that were truncated to a length and kept."""

    documents: int = 0
    lost_answers: int = 0
    """Answers of which nothing remains."""
    cut_answers: int = 0
    """Answers whose end is missing."""

    def __add__(self, other: "Truncation") -> "Truncation":
        return Truncation(
            self.documents + other.documents,
            self.lost_answers + other.lost_answers,
            self.cut_answers + other.cut_answers,
        )

    def describe(self, length: int) -> str:
        """Phrase for a log line; `length` is the --seq-length."""
        answers = f"{self.lost_answers:,} answers lost, {self.cut_answers:,} cut"
        return f"{self.documents:,} documents cut to --seq-length {length}: {answers}"


@dataclass
class EncodedRows:
    """Documents of a batch of rows: one document or fault for each row, in the order of the rows."""

    documents: list[Document | Fault]
    bytes: int = 0
    """Size of the text in UTF-8."""
    truncated: Truncation = field(default_factory=Truncation)


@dataclass(frozen=True)
class Supervision:
    """Supervised tokens of documents that are truncated to a length. An answer is a run of supervised
    tokens."""

    tokens: np.ndarray
    """[documents] int64: supervised tokens after truncation; the first token of a document is never a
    label."""
    lost_answers: np.ndarray
    """[documents] int64: answers that begin after the truncation."""
    cut_answers: np.ndarray
    """[documents] int64: answers that the truncation splits, 0 or 1."""
    exact: bool = True
    """False: documents that fit were not read, and `tokens` is an upper bound for them."""


def count_supervised(mask: np.ndarray, lengths: np.ndarray, length: int) -> Supervision:
    """Counts supervised tokens and answers for documents that are truncated to `length` tokens.

    `mask` [tokens] bool: loss masks of all documents, concatenated; `lengths` [documents].
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    stops = begins + np.minimum(lengths, length)
    supervised_before = _counts_before(mask)
    tokens = supervised_before[stops] - supervised_before[np.minimum(begins + 1, stops)]
    lost, cut = np.zeros((2, len(ends)), np.int64)
    long = lengths > length
    if long.any():
        answer_begins = mask.copy()
        answer_begins[1:] &= ~mask[:-1]
        answer_begins[begins[long]] = mask[begins[long]]
        answers_before = _counts_before(answer_begins)
        lost[long] = (answers_before[ends] - answers_before[stops])[long]
        cut[long] = (mask[stops[long] - 1] & mask[stops[long]]).astype(np.int64)
    return Supervision(tokens, lost, cut)


def _counts_before(mask: np.ndarray) -> np.ndarray:
    """Number of set elements before each index, [tokens + 1] int64."""
    return np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
