"""What rows become, and what keeps documents: the two types at this door, and why a row became none."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Document:
    """One document as the model sees it."""

    tokens: np.ndarray
    """Ids [n] int32."""
    loss_mask: np.ndarray | None = None
    """[n] bool, False where a token is not to be learnt; None: all are."""


@dataclass(frozen=True)
class Fault:
    """Why a row makes no document."""

    kind: str
    """What it is counted under."""
    detail: str = ""
    """What is wrong with this one."""

    def __str__(self) -> str:
        return f"{self.detail} ({self.kind})" if self.detail else self.kind


class Documents(Protocol):
    """Documents of one origin, by number."""

    prefix: str
    """What the user calls it, for messages."""
    lengths: np.ndarray
    """Ids of every document, [documents] of an integer type."""
    files: np.ndarray
    """The first document of every file, and the end: [files + 1] int64."""

    def document(self, number: int) -> Document:
        """Document `number`, whole. Raises `UserError` when it is damaged."""

    def learnt(self, numbers: np.ndarray, length: int) -> "Supervision":
        """Of the first `length` tokens of each of the documents `numbers`."""


@dataclass(frozen=True)
class Truncation:
    """What was lost of documents that were cut to a length and kept."""

    documents: int = 0
    lost: int = 0
    """Answers of which nothing is left."""
    cut: int = 0
    """Answers whose end is gone."""

    def __add__(self, other: "Truncation") -> "Truncation":
        return Truncation(self.documents + other.documents, self.lost + other.lost, self.cut + other.cut)

    def said(self, length: int) -> str:
        """For a person."""
        return f"{self.documents:,} documents cut to --seq-length {length}: {self.lost:,} answers lost, {self.cut:,} cut"


@dataclass
class EncodedRows:
    """What rows became, one for each row and in their order."""

    documents: list[Document | Fault]
    bytes: int = 0
    """Of their text, in UTF-8."""
    truncated: Truncation = field(default_factory=Truncation)


@dataclass(frozen=True)
class Supervision:
    """What is to be learnt of documents of which the first tokens are taken, up to a length. An answer is a run of tokens to be
    learnt."""

    tokens: np.ndarray
    """[documents] int64: to be learnt of those taken; the first of all is predicted by none."""
    lost: np.ndarray
    """[documents] int64: answers of which nothing is taken."""
    cut: np.ndarray
    """[documents] int64: answers whose end is not taken, 0 or 1."""
    exact: bool = True
    """False: documents that are taken whole were not read, and `tokens` says how many there could be."""


def count_supervised(mask: np.ndarray, lengths: np.ndarray, length: int) -> Supervision:
    """`mask` [tokens] bool, of documents one after the other; their `lengths` [documents]; `length`: tokens taken of each."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    stops = begins + np.minimum(lengths, length)
    before = _running(mask)
    tokens = before[stops] - before[np.minimum(begins + 1, stops)]
    lost, cut = np.zeros((2, len(ends)), np.int64)
    long = lengths > length
    if long.any():
        opens = mask.copy()
        opens[1:] &= ~mask[:-1]
        opens[begins[long]] = mask[begins[long]]
        answers = _running(opens)
        lost[long] = (answers[ends] - answers[stops])[long]
        cut[long] = (mask[stops[long] - 1] & mask[stops[long]]).astype(np.int64)
    return Supervision(tokens, lost, cut)


def _running(mask: np.ndarray) -> np.ndarray:
    """[tokens + 1] int64: how many are set before each place."""
    return np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
