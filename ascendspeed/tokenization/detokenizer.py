"""Tokens -> text as they come: what is shown piece by piece is, byte for byte, what decoding all of them at once would give.

Held back are bytes of a character that is not complete yet, and text that may be the beginning of a stop string.
"""

from collections.abc import Iterable, Sequence

from ascendspeed.tokenization.tokenizer import Tokenizer

UTF8_LENGTHS = ((0xF8, 1), (0xF0, 4), (0xE0, 3), (0xC0, 2), (0x00, 1))
"""Lowest first byte of a character in UTF-8 -> how many bytes it has."""


class IncrementalDecoder:
    """Pushed one id after the other, gives the text that can no longer change; in all, `tokenizer.decode` of the ids.

    The work per token does not depend on how many came before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []  # ids whose text is not given out yet
        self._sizes: list[int] = []  # of those that add bytes: how many
        self._open = b""  # bytes at the end that need more
        self._begins = (
            True  # nothing has been given out of what decodes together: a leading space may be dropped there
        )
        self._anchor: tuple[int, str] | None = None

    def push(self, token: int) -> str:
        """The text that has become certain with this id, often empty. Raises `UserError` for an id that is no token."""
        raw = self._tokenizer.token_bytes(token) if 0 <= token < self._tokenizer.vocab_size else None
        if raw == b"":
            return ""
        self._held.append(token)
        if raw is None:
            self._open, self._sizes = b"", []
            return self._give(len(self._held))
        if self._tokenizer.decodes_byte_runs:
            return ""  # until an id that adds no bytes ends the run
        self._open = incomplete_utf8(self._open + raw)
        self._sizes.append(len(raw))
        return self._give(len(self._held) - waiting) if (waiting := self._waiting()) is not None else ""

    def finish(self) -> str:
        """The rest, when nothing follows."""
        rest = self._tokenizer.decode(self._held) if self._begins else self._after_text(self._held)
        self._held, self._sizes, self._open = [], [], b""
        return rest

    def _waiting(self) -> int | None:
        """How many of the last ids are the open bytes; None when those begin inside an id."""
        count, size = 0, 0
        while size < len(self._open):
            count, size = count + 1, size + self._sizes[-1 - count]
        return count if size == len(self._open) else None

    def _give(self, count: int) -> str:
        """Text of the first held ids. Those that begin a text and have none stay: they decide on what becomes of the next ones."""
        ids, rest = self._held[:count], self._held[count:]
        if not ids:
            return ""
        text = self._tokenizer.decode(ids) if self._begins else self._after_text(ids)
        if not text and self._begins:
            return ""
        self._held, self._sizes = rest, self._sizes[len(self._sizes) - len(rest) :]
        self._begins = self._tokenizer.resets_decoder(ids[-1])
        return text

    def _after_text(self, ids: Sequence[int]) -> str:
        """As they decode in the middle of a text."""
        if not ids:
            return ""
        if self._anchor is None:
            self._anchor = _anchor(self._tokenizer)
        token, text = self._anchor
        return self._tokenizer.decode([token, *ids])[len(text) :]


def incomplete_utf8(data: bytes) -> bytes:
    """What at the end of some bytes may be the beginning of a character: at most three bytes.

    Whatever a decoder makes of wrong bytes, it makes it of those before this end on their own.
    """
    for size in range(1, min(3, len(data)) + 1):
        first = data[-size]
        if first >= 0x80 and first & 0xC0 == 0x80:
            continue  # inside a character
        return (
            data[-size:] if size < next(length for lowest, length in UTF8_LENGTHS if first >= lowest) else b""
        )
    return b""


def _anchor(tokenizer: Tokenizer) -> tuple[int, str]:
    """A token and its text, plain letters, to decode others after."""
    for token in range(tokenizer.vocab_size):
        if tokenizer.token_bytes(token) != b"" and not tokenizer.resets_decoder(token):
            text = tokenizer.decode([token])
            if text.isascii() and text.isalnum():
                return token, text
    return 0, tokenizer.decode([0])


class StopStringFilter:
    """Text as it comes -> the text before the stop string that is complete first (of two, the longer one), however it is cut."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(dict.fromkeys(string for string in strings if string))
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; nothing is given out any more."""

    def push(self, text: str) -> str:
        """What of the text so far can be no part of a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            given, self._held, self.stopped = self._held[: min(found)[1]], "", True
            return given
        keep = max((_overlap(self._held, s) for s in self._strings), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def finish(self) -> str:
        """The rest, when nothing follows."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of the text with which the string begins, without being complete."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)


class TextStream:
    """Tokens -> text, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        self._decoder, self._stops = IncrementalDecoder(tokenizer), StopStringFilter(stops)
        self._given: list[str] = []

    @property
    def text(self) -> str:
        """All that has been given out."""
        return "".join(self._given)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """The text that has become certain."""
        return self._keep(self._stops.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The rest, when no token follows; once."""
        return self._keep(self._stops.push(self._decoder.finish()) + self._stops.finish())

    def _keep(self, text: str) -> str:
        if text:
            self._given.append(text)
        return text


def decode_until_stop(
    tokenizer: Tokenizer, tokens: Iterable[int], stops: Iterable[str] = ()
) -> tuple[str, bool]:
    """Text of tokens up to the first stop string, and whether there was one."""
    stream = TextStream(tokenizer, stops)
    for token in tokens:
        stream.push(token)
        if stream.stopped:
            break
    stream.finish()
    return stream.text, stream.stopped
