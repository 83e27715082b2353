"""Ids of words that were encoded before, by numbers that grow with every new word."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ascendspeed.tokenization.text_cuts import NoExactCutsError, TextCuts
from ascendspeed.tokenization.word_table import MAX_WORD_BYTES, WordTable, word_keys

TABLE_BITS = 20
MAX_WORDS = 1 << (TABLE_BITS - 1)
MAX_IDS = 1 << 22
MAX_LONG_CHARACTERS = 1 << 24
"""Bounds of the cache: 24 MiB of tables, 16 MiB of ids, 16 M characters of longer words. Beyond one of them
it begins anew, before the next pass."""
WORDS_PER_TEXT = 64
"""New words that sentencepiece encodes as one text, with separators between them."""


class _Growing:
    """An int32 array that grows at its end."""

    def __init__(self) -> None:
        self._values = np.empty(1024, np.int32)
        self.size = 0

    def extend(self, values: np.ndarray) -> None:
        """Appends values."""
        end = self.size + len(values)
        if end > len(self._values):
            grown = np.empty(2 * end, np.int32)
            grown[: self.size] = self._values[: self.size]
            self._values = grown
        self._values[self.size : end] = values
        self.size = end

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self._values[index]


class WordCache:
    """Encodes the words of a text; a new one by sentencepiece, a known one by its kept ids."""

    def __init__(self, model: Any, cuts: TextCuts) -> None:
        """`model`: a `SentencePieceProcessor` without dummy prefix. Raises `NoExactCutsError` if no character
        can separate words."""
        self._model, self.cuts = model, cuts
        isolated = [chr(code) for code in range(1, 0x20) if cuts.is_isolated(chr(code))]
        candidates = {character: model.encode(character) for character in isolated}
        self._separator = next((character for character, ids in candidates.items() if len(ids) == 1), "")
        if not self._separator:
            raise NoExactCutsError("its pieces join every control character with others")
        self._separator_id = candidates[self._separator][0]
        self._table = WordTable(TABLE_BITS)
        self._clear()

    def encode(self, text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids [ids] int32 of a text that is cut into words, and their number in each word [words].

        `ends`: [words] end of every word in characters, increasing; the last is the end of the text.
        """
        if self._is_full():
            self._clear()
        begins = np.concatenate([[0], ends[:-1]])
        data = text.encode()
        if len(data) == len(text):
            first_bytes, lengths = begins, ends - begins
        else:
            characters = np.flatnonzero(np.frombuffer(data, np.int8) >= -0x40)  # not a continuation byte
            first_bytes = characters[begins]
            lengths = np.diff(first_bytes, append=len(data))
        is_long = lengths > MAX_WORD_BYTES
        low, high = word_keys(data, first_bytes, np.where(is_long, MAX_WORD_BYTES, lengths))
        numbers = self._table.find(low, high)
        numbers[is_long] = -1  # its keys are those of its beginning
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            edges = zip(begins[missing].tolist(), ends[missing].tolist(), strict=True)
            words = [text[begin:end] for begin, end in edges]
            numbers[missing] = self._numbers_of(words, low[missing], high[missing], is_long[missing])
        return self._ids_of(numbers)

    def _ids_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of words in a row, and their counts."""
        counts = self._counts[numbers]
        id_ends = np.cumsum(counts, dtype=np.int64)
        total = int(id_ends[-1])
        shifts = np.repeat(self._begins[numbers] - (id_ends - counts), counts)
        return self._ids[shifts + np.arange(total)], counts

    def _numbers_of(
        self, words: Sequence[str], low: np.ndarray, high: np.ndarray, is_long: np.ndarray
    ) -> np.ndarray:
        """Returns the numbers of words that are not in the table, and adds those that are new."""
        new_words = list(dict.fromkeys(word for word in words if word not in self._long))
        first_number = self._counts.size
        new_numbers = dict(zip(new_words, range(first_number, first_number + len(new_words)), strict=True))
        numbers = np.array(
            [self._long[word] if word in self._long else new_numbers[word] for word in words], np.int32
        )
        if new_words:
            self._append(new_words)
            is_new = np.flatnonzero((numbers >= first_number) & ~is_long)
            short_numbers, index = np.unique(numbers[is_new], return_index=True)
            self._table.add(low[is_new[index]], high[is_new[index]], short_numbers)
            long_words = {words[i]: int(numbers[i]) for i in np.flatnonzero(is_long).tolist()}
            self._long |= long_words
            self._long_characters += sum(map(len, long_words))
        return numbers

    def _append(self, words: Sequence[str]) -> None:
        """Encodes words and keeps their ids under the next numbers."""
        starts = range(0, len(words), WORDS_PER_TEXT)
        texts = [self._separator.join(words[i : i + WORDS_PER_TEXT]) + self._separator for i in starts]
        ids = np.concatenate(self._model.encode_as_numpy(texts, num_threads=1))
        is_separator = ids == self._separator_id
        ends = np.flatnonzero(is_separator)
        counts = np.diff(ends, prepend=-1) - 1
        assert len(counts) == len(words)
        self._begins.extend(self._ids.size + np.cumsum(counts) - counts)
        self._counts.extend(counts)
        self._ids.extend(ids[~is_separator])

    def _is_full(self) -> bool:
        sizes = (self._counts.size, self._ids.size, self._long_characters)
        bounds = (MAX_WORDS, MAX_IDS, MAX_LONG_CHARACTERS)
        return any(size > bound for size, bound in zip(sizes, bounds, strict=True))

    def _clear(self) -> None:
        self._table.clear()
        self._long: dict[str, int] = {}
        self._long_characters = 0
        self._ids, self._begins, self._counts = _Growing(), _Growing(), _Growing()
        # The separator is a word of its own wherever it occurs in text; it is never among the new words.
        self._begins.extend(np.zeros(1, np.int32))
        self._counts.extend(np.ones(1, np.int32))
        self._ids.extend(np.array([self._separator_id], np.int32))
        keys = word_keys(self._separator.encode(), np.zeros(1, np.int64), np.ones(1, np.int64))
        self._table.add(*keys, np.zeros(1, np.int32))
