"""Hash table from short words to numbers, in numpy arrays: many words are looked up in one pass."""

import numpy as np

MAX_WORD_BYTES = 15
"""Longest word: with its length it fills two 64-bit keys, so that equal keys are equal words."""
_LOW_MASKS = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(MAX_WORD_BYTES + 1)], np.uint64)
_HIGH_MASKS = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(MAX_WORD_BYTES + 1)], np.uint64)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd, of irregular bits
_HALF = np.uint64(32)


def word_keys(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two uint64 [words] that hold the bytes [start, start + length) of `data` and the length, for
    lengths from 1 to `MAX_WORD_BYTES`."""
    padded = data + bytes(16)
    every_eight = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
    low = every_eight.take(starts) & _LOW_MASKS[lengths]
    high = every_eight.take(starts + 8) & _HIGH_MASKS[lengths]
    return low, high | lengths.astype(np.uint64) << np.uint64(56)


class WordTable:
    """Open addressing with linear probing; at most half of the slots are used."""

    def __init__(self, bits: int) -> None:
        """`bits`: log2 of the number of slots."""
        self._shift = np.uint64(64 - bits)
        self._last = (1 << bits) - 1
        self._low = np.zeros(1 << bits, np.uint64)
        self._high = np.zeros(1 << bits, np.uint64)  # 0: the slot is free; a key has its length there
        self._numbers = np.zeros(1 << bits, np.int32)

    def clear(self) -> None:
        """Removes all words."""
        self._high.fill(0)

    def find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Returns the number of each word, int32 [words]; -1 for an absent one."""
        slots = self._slots(low, high)
        stored = self._high[slots]
        matches = (stored == high) & (self._low[slots] == low)
        numbers = np.where(matches, self._numbers[slots], np.int32(-1))
        rest = np.flatnonzero(~matches & (stored != 0))
        while len(rest):
            slots[rest] = (slots[rest] + 1) & self._last
            stored = self._high[slots[rest]]
            matches = (stored == high[rest]) & (self._low[slots[rest]] == low[rest])
            numbers[rest[matches]] = self._numbers[slots[rest[matches]]]
            rest = rest[~matches & (stored != 0)]
        return numbers

    def add(self, low: np.ndarray, high: np.ndarray, numbers: np.ndarray) -> None:
        """Adds words that are absent, each once."""
        slots = self._slots(low, high)
        while len(slots):
            free = self._high[slots] == 0
            chosen = slots[free]
            self._numbers[chosen] = numbers[free]  # of several words for one slot the last one stays
            taken = np.zeros(len(slots), bool)
            taken[free] = self._numbers[chosen] == numbers[free]
            self._low[slots[taken]] = low[taken]
            self._high[slots[taken]] = high[taken]
            slots = (slots[~taken] + 1) & self._last
            low, high, numbers = low[~taken], high[~taken], numbers[~taken]

    def _slots(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = low * _FACTORS[0] ^ high * _FACTORS[1]
        mixed ^= mixed >> _HALF
        return (mixed * _FACTORS[0] >> self._shift).astype(np.int64)
