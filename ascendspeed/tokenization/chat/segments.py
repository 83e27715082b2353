"""Training texts as segments: text or control tokens, each supervised (in the loss) or not, encoded to ids
and a loss mask."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

EncodeBatch = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Texts -> ids [n] of each."""
TextInContext = tuple[str, bool]
"""A text, and whether it follows another text (not a control token)."""


@dataclass(frozen=True)
class PromptSegment:
    """A run of text, or a control token by its id."""

    content: str | int
    supervised: bool = False


class SegmentEncoder:
    """Encodes sequences of segments.

    Supervised text is encoded apart from the text before it, so that an answer has the tokens that it has in
    generation, where it follows the encoded prompt. Neighbouring texts that are both supervised or both not
    are encoded as one text.
    """

    def __init__(self, encode: EncodeBatch) -> None:
        self._encode = encode
        # Some tokenizers put a space before every text, which is wrong where text follows text. There a text
        # is encoded behind this lead, whose ids are then removed.
        lead, both, alone = encode(["\n", "\nx", "x"])
        self._lead = None if np.array_equal(both[len(lead) :], alone) else np.asarray(lead)

    def __call__(self, documents: Iterable[Sequence[PromptSegment]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (ids [n] int32, supervised [n] bool) of every sequence of segments.

        All texts are encoded in one batch.
        """
        merged = [_merge(segments) for segments in documents]
        contexts = [_texts_in_context(segments) for segments in merged]
        unique = list(dict.fromkeys(text for texts in contexts for text in texts if text))
        ids = dict(zip(unique, self._encode_texts(unique), strict=True))
        encoded = []
        for segments, texts in zip(merged, contexts, strict=True):
            encoded.append(self._concatenate(segments, [ids[text] if text else None for text in texts]))
        return encoded

    def _encode_texts(self, texts: Sequence[TextInContext]) -> list[np.ndarray]:
        needs_lead = [self._lead is not None and follows_text for _, follows_text in texts]
        encoded = self._encode(
            [f"\n{text}" if lead else text for (text, _), lead in zip(texts, needs_lead, strict=True)]
        )
        return [
            self._remove_lead(ids, text) if lead else ids
            for ids, (text, _), lead in zip(encoded, texts, needs_lead, strict=True)
        ]

    def _remove_lead(self, ids: np.ndarray, text: str) -> np.ndarray:
        if self._lead is not None and np.array_equal(ids[: len(self._lead)], self._lead):
            return ids[len(self._lead) :]
        # The beginning of the text was merged with the lead's last token: encode it by itself.
        return np.asarray(self._encode([text])[0])

    def _concatenate(
        self, segments: Sequence[PromptSegment], texts: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`texts`: ids of each segment that is text, None for a control token."""
        parts = [
            np.array([segment.content]) if ids is None else ids
            for segment, ids in zip(segments, texts, strict=True)
        ]
        supervised = np.repeat([segment.supervised for segment in segments], [len(part) for part in parts])
        return np.concatenate(parts).astype(np.int32), supervised.astype(bool)


def _merge(segments: Sequence[PromptSegment]) -> list[PromptSegment]:
    """Drops empty text and joins neighbouring texts that are both supervised or both not."""
    merged: list[PromptSegment] = []
    for segment in segments:
        if segment.content == "":
            continue
        if merged and _can_join(merged[-1], segment):
            merged[-1] = PromptSegment(merged[-1].content + segment.content, segment.supervised)  # type: ignore[operator]
        else:
            merged.append(segment)
    return merged


def _can_join(first: PromptSegment, second: PromptSegment) -> bool:
    both_text = isinstance(first.content, str) and isinstance(second.content, str)
    return both_text and first.supervised == second.supervised


def _texts_in_context(segments: Sequence[PromptSegment]) -> list[TextInContext | None]:
    """Returns every text with its context; None for control tokens."""
    contexts: list[TextInContext | None] = []
    follows_text = False
    for segment in segments:
        is_text = isinstance(segment.content, str)
        contexts.append((segment.content, follows_text) if is_text else None)  # type: ignore[arg-type]
        follows_text = is_text
    return contexts
