"""Splits text at added tokens as the `tokenizers` library does, for vocabularies that do not know them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
"""Unicode's White_Space; Python's \\s also has four control characters."""
WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it occurs in a text."""

    number: int
    """Token id."""
    special: bool
    single_word: bool = False
    """Matches only between characters that are no part of a word."""
    lstrip: bool = False
    """Takes the whitespace on its left too."""
    rstrip: bool = False
    """Takes the whitespace on its right too."""


class AddedTokenSplitter:
    """Finds added tokens in text: the leftmost first, and of several the longest.

    A special token that is not parsed stays text as a whole: no other token is found inside it.
    """

    def __init__(self, tokens: Mapping[str, AddedToken], parse_special: bool = False) -> None:
        self._tokens = tokens
        self._parsed = {name for name, token in tokens.items() if parse_special or not token.special}
        names = sorted(tokens, key=len, reverse=True) if self._parsed else []
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def split(self, text: str) -> list[str | int]:
        """Returns the parts of a text in order: ids of added tokens, and non-empty text between them."""
        if self._pattern is None or not self._pattern.search(text):
            return [text] if text else []
        return list(self._parts(text))

    def _parts(self, text: str) -> Iterator[str | int]:
        position = 0
        for match in self._pattern.finditer(text):  # type: ignore[union-attr]
            token = self._tokens[match[0]]
            start, end = match.span()
            if match[0] not in self._parsed or (token.single_word and _touches_word(text, start, end)):
                continue
            while token.lstrip and start > position and SPACE.match(text, start - 1):
                start -= 1
            while token.rstrip and SPACE.match(text, end):
                end += 1
            if start > position:
                yield text[position:start]
            yield token.number
            position = end
        if position < len(text):
            yield text[position:]


def _touches_word(text: str, start: int, end: int) -> bool:
    return bool((start and WORD.match(text, start - 1)) or WORD.match(text, end))
