"""A shuffled order of any number of things that needs no table."""

import hashlib

import numpy as np

ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of 0 ... count - 1, the same everywhere for the same seed.

    A Feistel network over the next power of 4, walked until it comes back below `count` (cycle walking): four steps at most on
    average.
    """

    def __init__(self, count: int, seed: int) -> None:
        digest = (
            hashlib.sha256(f"{seed} {count}".encode()).digest()
            + hashlib.sha256(f"{count} {seed}".encode()).digest()
        )
        self._count, self._keys = np.uint64(count), np.frombuffer(digest, "<u8")[:ROUNDS].astype(np.uint64)
        self._half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at `places` [n], each at least 0 and below the count: int64 [n]."""
        found = self._mixed(places.astype(np.uint64))
        while (beyond := found >= self._count).any():
            found[beyond] = self._mixed(found[beyond])
        return found.astype(np.int64)

    def _mixed(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_hashed(right ^ key) & self._mask)
        return (left << self._half) | right


def _hashed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64; arrays of uint64 wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
