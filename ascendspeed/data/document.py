"""What rows become, and what keeps documents: the two types at this door, and why a row became none."""

from dataclasses import dataclass
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


@dataclass
class Made:
    """What rows became, one for each row and in their order."""

    documents: list[Document | Fault]
    bytes: int = 0
    """Of their text, in UTF-8."""
    truncated: int = 0
    """Documents that were cut to the wanted length."""


def learns_within(loss_mask: np.ndarray | None, length: int) -> bool:
    """Whether the first `length` tokens of a document hold one to be learnt; the first of all is predicted by none."""
    return loss_mask is None or bool(loss_mask[1:length].any())
