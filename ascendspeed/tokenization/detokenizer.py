"""Incremental detokenization: text token by token, byte for byte equal to decoding all tokens at once.

Bytes of an incomplete character, and text that may begin a stop string, are held back.
"""

from collections.abc import Iterable, Sequence

from ascendspeed.tokenization.tokenizer import Tokenizer

UTF8_LENGTHS = ((0xF8, 1), (0xF0, 4), (0xE0, 3), (0xC0, 2), (0x00, 1))
"""(lowest first byte of a UTF-8 character, its number of bytes), highest first."""


class IncrementalDecoder:
    """Decodes token by token and returns text as soon as it can no longer change; in total
    `tokenizer.decode(ids)`.

    The work per token does not depend on the number of tokens before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # ids whose text has not been returned yet
        self._pending_bytes: list[int] = []  # number of bytes of the pending ids that add bytes
        self._incomplete = b""  # bytes of an unfinished character at the end
        # True while nothing of the current decoding unit has been returned: a leading space may be dropped
        # there.
        self._at_start = True
        self._anchor: tuple[int, str] | None = None

    def push(self, token: int) -> str:
        """Returns the text that this id completes, often "".

        Raises `UserError` for an id outside the vocabulary.
        """
        known = 0 <= token < self._tokenizer.vocab_size
        data = self._tokenizer.token_bytes(token) if known else None
        if data == b"":
            return ""
        self._pending.append(token)
        if data is None:
            self._incomplete, self._pending_bytes = b"", []
            return self._take(len(self._pending))
        if self._tokenizer.decodes_byte_runs:
            return ""  # until an id that adds no bytes ends the run
        self._incomplete = incomplete_utf8(self._incomplete + data)
        self._pending_bytes.append(len(data))
        waiting = self._count_incomplete_ids()
        return "" if waiting is None else self._take(len(self._pending) - waiting)

    def finish(self) -> str:
        """Returns the remaining text after the last token."""
        decode = self._tokenizer.decode if self._at_start else self._decode_continuation
        text = decode(self._pending)
        self._pending, self._pending_bytes, self._incomplete = [], [], b""
        return text

    def _count_incomplete_ids(self) -> int | None:
        """Returns the number of last ids that form the incomplete bytes; None if these begin inside an id."""
        count = 0
        size = 0
        while size < len(self._incomplete):
            count += 1
            size += self._pending_bytes[-count]
        return count if size == len(self._incomplete) else None

    def _take(self, count: int) -> str:
        """Returns the text of the first `count` pending ids and forgets these.

        Leading ids that decode to nothing are kept: they affect how the next ones decode.
        """
        ids, later = self._pending[:count], self._pending[count:]
        if not ids:
            return ""
        text = self._tokenizer.decode(ids) if self._at_start else self._decode_continuation(ids)
        if not text and self._at_start:
            return ""
        self._pending = later
        self._pending_bytes = self._pending_bytes[len(self._pending_bytes) - len(later) :]
        self._at_start = self._tokenizer.resets_decoder(ids[-1])
        return text

    def _decode_continuation(self, ids: Sequence[int]) -> str:
        """Decodes ids as in the middle of a text."""
        if not ids:
            return ""
        if self._anchor is None:
            self._anchor = _anchor(self._tokenizer)
        token, text = self._anchor
        return self._tokenizer.decode([token, *ids])[len(text) :]


def incomplete_utf8(data: bytes) -> bytes:
    """Returns the end of `data` that may begin a character: at most three bytes.

    A decoder of malformed bytes treats those before this end independently of what follows.
    """
    for size in range(1, min(3, len(data)) + 1):
        first = data[-size]
        if first & 0xC0 == 0x80:
            continue  # a continuation byte
        length = next(length for lowest, length in UTF8_LENGTHS if first >= lowest)
        return data[-size:] if size < length else b""
    return b""


def _anchor(tokenizer: Tokenizer) -> tuple[int, str]:
    """Returns a token of plain letters or digits and its text: other ids are decoded behind it."""
    for token in range(tokenizer.vocab_size):
        if tokenizer.token_bytes(token) != b"" and not tokenizer.resets_decoder(token):
            text = tokenizer.decode([token])
            if text.isascii() and text.isalnum():
                return token, text
    return 0, tokenizer.decode([0])


class StopStringFilter:
    """Passes text on up to the stop string that is complete first (the longer of two), however the text is
    split."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(dict.fromkeys(string for string in strings if string))
        self._pending = ""
        self.stopped = False
        """True once a stop string is complete; no more text is returned."""

    def push(self, text: str) -> str:
        """Returns the text that cannot be part of a stop string."""
        if self.stopped:
            return ""
        self._pending += text
        matches = []
        for string in self._strings:
            start = self._pending.find(string)
            if start >= 0:
                matches.append((start + len(string), start))
        if matches:
            _, start = min(matches)
            released = self._pending[:start]
            self._pending, self.stopped = "", True
            return released
        overlap = max((_overlap(self._pending, string) for string in self._strings), default=0)
        end = len(self._pending) - overlap
        released, self._pending = self._pending[:end], self._pending[end:]
        return released

    def finish(self) -> str:
        """Returns the remaining text after the last push."""
        text, self._pending = self._pending, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Returns the length of the longest end of `text` that is an incomplete beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)


class TextStream:
    """Decodes token by token up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop_filter = StopStringFilter(stops)
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._parts)

    @property
    def stopped(self) -> bool:
        """True once a stop string is complete."""
        return self._stop_filter.stopped

    def push(self, token: int) -> str:
        """Returns the text that this token completes."""
        return self._record(self._stop_filter.push(self._decoder.push(token)))

    def finish(self) -> str:
        """Returns the remaining text after the last token; call it once."""
        return self._record(self._stop_filter.push(self._decoder.finish()) + self._stop_filter.finish())

    def _record(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


def decode_until_stop(
    tokenizer: Tokenizer, tokens: Iterable[int], stops: Iterable[str] = ()
) -> tuple[str, bool]:
    """Returns the text of `tokens` up to the first stop string, and whether there was one."""
    stream = TextStream(tokenizer, stops)
    for token in tokens:
        stream.push(token)
        if stream.stopped:
            break
    stream.finish()
    return stream.text, stream.stopped
