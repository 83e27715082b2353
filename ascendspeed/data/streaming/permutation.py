"""Pseudo-random permutation in O(1) memory (Feistel network)."""

import hashlib

import numpy as np

ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of 0 ... count - 1, identical everywhere for the same seed.

    A Feistel network over the next power of 4, applied again until the result is below `count` (cycle
    walking): at most four steps on average.
    """

    def __init__(self, count: int, seed: int) -> None:
        first = hashlib.sha256(f"{seed} {count}".encode()).digest()
        second = hashlib.sha256(f"{count} {seed}".encode()).digest()
        self._count = np.uint64(count)
        self._keys = np.frombuffer(first + second, "<u8")[:ROUNDS].astype(np.uint64)
        self._half_bits = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half_bits) - np.uint64(1)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Maps `indices` [n], each at least 0 and below the count, to int64 [n]."""
        permuted = self._feistel(indices.astype(np.uint64))
        while (beyond := permuted >= self._count).any():
            permuted[beyond] = self._feistel(permuted[beyond])
        return permuted.astype(np.int64)

    def _feistel(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half_bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_splitmix64(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Finalizer of splitmix64; uint64 arrays wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
