"""A text to learn from, in pieces: what of it is to be learnt, and the control tokens in it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Encode = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Texts -> ids [n] of each."""
Place = tuple[str, bool]
"""A text, and whether it follows another text (not a control token)."""


@dataclass(frozen=True)
class PromptSegment:
    """A run of text, or a token by its id."""

    content: str | int
    supervised: bool = False


class SegmentEncoder:
    """Pieces -> ids, by a tokenizer.

    What is learnt is encoded apart from what stands before it: an answer's tokens are those that follow the prompt's, as they do
    when the answer is asked for. Pieces that are alike in this are one text.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        lead, both, alone = encode(["\n", "\nx", "x"])
        # Some tokenizers put a space before every text. Where text follows text there is none, so it is encoded behind this one.
        self._lead = None if np.array_equal(both[len(lead) :], alone) else np.asarray(lead)

    def __call__(self, many: Iterable[Sequence[PromptSegment]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids [n] int32, learnt [n] bool) of every sequence of pieces; all texts are encoded at once."""
        joined = [_joined(pieces) for pieces in many]
        places = [_places(pieces) for pieces in joined]
        wanted = list(dict.fromkeys(place for found in places for place in found if place))
        ids = dict(zip(wanted, self._ids(wanted), strict=True))
        return [
            self._document(pieces, [place and ids[place] for place in found])
            for pieces, found in zip(joined, places, strict=True)
        ]

    def _ids(self, places: Sequence[Place]) -> list[np.ndarray]:
        behind = [self._lead is not None and follows for _, follows in places]
        found = self._encode(
            [f"\n{text}" if led else text for (text, _), led in zip(places, behind, strict=True)]
        )
        return [
            self._after_lead(ids, text) if led else ids
            for ids, (text, _), led in zip(found, places, behind, strict=True)
        ]

    def _after_lead(self, ids: np.ndarray, text: str) -> np.ndarray:
        size = len(self._lead)  # type: ignore[arg-type]
        # A text that begins so that the lead's last token would grow is encoded by itself.
        return ids[size:] if np.array_equal(ids[:size], self._lead) else np.asarray(self._encode([text])[0])

    def _document(
        self, pieces: Sequence[PromptSegment], texts: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            np.array([piece.content]) if ids is None else ids
            for piece, ids in zip(pieces, texts, strict=True)
        ]
        lengths = [len(part) for part in parts]
        learnt = np.repeat([piece.supervised for piece in pieces], lengths)
        return np.concatenate(parts).astype(np.int32), learnt.astype(bool)


def _joined(pieces: Sequence[PromptSegment]) -> list[PromptSegment]:
    """Without empty text, and neighbouring texts that are alike as one."""
    found: list[PromptSegment] = []
    for piece in pieces:
        last = found[-1] if found else None
        if (
            last
            and isinstance(last.content, str)
            and isinstance(piece.content, str)
            and last.supervised == piece.supervised
        ):
            found[-1] = PromptSegment(last.content + piece.content, piece.supervised)
        elif piece.content != "":
            found.append(piece)
    return found


def _places(pieces: Sequence[PromptSegment]) -> list[Place | None]:
    before: Sequence[PromptSegment | None] = [None, *pieces[:-1]]
    return [
        (piece.content, bool(last) and isinstance(last.content, str))
        if isinstance(piece.content, str)
        else None
        for last, piece in zip(before, pieces, strict=True)
    ]
