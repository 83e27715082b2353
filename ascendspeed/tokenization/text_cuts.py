"""Positions at which a text may be cut so that the ids of the parts are the ids of the whole.

Why a cut is exact. Sentencepiece's BPE begins with the characters of the text, and with the user-defined
symbols that it finds from left to right, the longest first. Then it joins two neighbours into a piece of the
vocabulary as long as it can: first the pair with the best score, of equal ones the leftmost. So every symbol
is, at any time, a character or a piece. Let no piece hold the characters a and b side by side. Between an a
and a b of the text then

- no user-defined symbol extends over both: it would be such a piece. The search from left to right stops
  there;
- no pair is ever joined: the result would be such a piece. The two sides never compete for a pair, and each
  does its joins in the order in which it would do them alone (by score, then by position);
- nothing that follows the joins looks across: an unused piece is split into what it was joined from, and an
  unknown character becomes its bytes, each on its own.

The proof needs, and `read_model` checks:

- BPE. Unigram's best path weighs whole texts; word and char models are not needed here.
- A normalizer that changes no character: `identity`, that is no `precompiled_charsmap`. With one (`nmt_nfkc`)
  neighbouring characters are composed.
- `remove_extra_whitespaces` off: it strips the ends of a text and shortens runs of spaces.
- `treat_whitespace_as_suffix` off. `add_dummy_prefix` then is one space in front of a text that is not empty,
  which the caller adds. `escape_whitespaces` may be on or off: space and U+2581 are one character here.
- Byte fallback: without it a run of unknown characters becomes one <unk>.
- At most 64 user-defined symbols that begin with one another: of more, sentencepiece takes the 64th, not the
  longest.

Control, unknown and byte pieces are never found in text and join nothing. NUL is a character as any other.
Lone surrogates are no text for sentencepiece, which refuses them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SPACE = "\u2581"
"""Character that sentencepiece writes for a space."""
BETWEEN = 0xD800
"""Code between two pieces: a surrogate, which no piece holds."""
CODES = 0x110000
"""Number of Unicode's code points."""
MAX_TABLE_BYTES = 64 << 20
MAX_NESTED = 64
"""User-defined symbols that sentencepiece finds at one position."""
NORMAL, USER_DEFINED, UNUSED, BYTE = 1, 4, 5, 6
"""Values of `SentencePiece.Type`."""
IN_TEXT = (NORMAL, USER_DEFINED, UNUSED)
"""Types of the pieces that are found in text."""
BPE = 2
"""`TrainerSpec.ModelType`."""


class NoExactCutsError(ValueError):
    """A model does not satisfy the conditions of the proof."""


class TextCuts:
    """Table of the characters that stand side by side in a piece of the vocabulary."""

    def __init__(self, pieces: Sequence[str]) -> None:
        """`pieces`: those that are found in text. Raises `NoExactCutsError`."""
        text = chr(BETWEEN).join(pieces).replace(" ", SPACE)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        inside = (codes[:-1] != BETWEEN) & (codes[1:] != BETWEEN)
        first, second = codes[:-1][inside], codes[1:][inside]
        lefts, rights = np.unique(first), np.unique(second)
        width = len(rights) + 1
        size = (len(lefts) + 1) * width
        if size > MAX_TABLE_BYTES:
            raise NoExactCutsError(f"its pieces join {len(lefts):,} with {len(rights):,} characters")
        # Row 0 and column 0 are those of characters that no piece joins with a right or a left neighbour.
        self.rows = np.zeros(CODES, np.int32)
        """Row of each character in the table, times its width."""
        self.columns = np.zeros(CODES, np.int32)
        """Column of each next character."""
        self.rows[lefts] = np.arange(1, len(lefts) + 1) * width
        self.columns[rights] = np.arange(1, len(rights) + 1)
        for table in (self.rows, self.columns):
            table[ord(" ")] = table[ord(SPACE)]
        self.is_cut = np.ones(size, bool)
        """The table: True where no piece has both characters side by side."""
        self.is_cut[self.rows[first] + self.columns[second]] = False


def read_model(data: bytes) -> Any:
    """Parses the content of a tokenizer.model. Raises `NoExactCutsError` for one without exact cuts."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise NoExactCutsError(f"protobuf cannot read it: {error}") from error
    rule, trainer = model.normalizer_spec, model.trainer_spec
    reasons = {
        "it is not a BPE model": trainer.model_type != BPE,
        f"its normalizer ({rule.name}) changes characters": bool(rule.precompiled_charsmap),
        "its normalizer removes extra spaces": rule.remove_extra_whitespaces,
        "it writes spaces as suffixes": trainer.treat_whitespace_as_suffix,
        "it has no byte fallback": not trainer.byte_fallback,
        f"more than {MAX_NESTED} user-defined symbols begin with one another": _nested(model) > MAX_NESTED,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        raise NoExactCutsError(reason)
    return model


def _nested(model: Any) -> int:
    """Returns the largest number of user-defined symbols of which each begins with the one before."""
    most, chain = 0, list[str]()
    for symbol in sorted(piece.piece for piece in model.pieces if piece.type == USER_DEFINED):
        while chain and not symbol.startswith(chain[-1]):
            chain.pop()
        chain.append(symbol)
        most = max(most, len(chain))
    return most
