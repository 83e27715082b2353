"""Prompt-lookup decoding: proposes the tokens that followed the last ones earlier in the text."""

from collections.abc import Sequence

NGRAM_SIZES = (3, 2)
"""Numbers of last tokens that are looked up, longest first."""


class PromptLookup:
    """Index of the n-grams of a growing text; adding a token takes constant time."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        """N-gram -> index of the token after its last occurrence."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the end of the text."""
        for token in tokens:
            index = len(self._tokens)
            for size in NGRAM_SIZES:
                if index >= size:
                    self._followers[tuple(self._tokens[index - size :])] = index
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def propose(self, most: int) -> tuple[int, ...]:
        """Returns up to `most` tokens that followed the text's last n-gram before; () if it is new."""
        for size in NGRAM_SIZES:
            start = self._followers.get(tuple(self._tokens[-size:]))
            if start is not None:
                return tuple(self._tokens[start : start + most])
        return ()
