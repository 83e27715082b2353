"""Hashes of samples of large files: detect a file that was replaced, cut, shifted or partly zeroed without
reading all of it."""

import hashlib
from pathlib import Path

SAMPLES = 64
SAMPLE_BYTES = 1 << 16


def hash_samples(path: Path, samples: int = SAMPLES) -> str:
    """Returns the SHA-256 of a file's size and of evenly spaced samples, the first and the last bytes among
    them; of a file up to `samples` * `SAMPLE_BYTES` bytes all content counts. Raises `OSError`."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        for start in _starts(size, samples):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _starts(size: int, samples: int) -> list[int]:
    last = max(0, size - SAMPLE_BYTES)
    if size <= samples * SAMPLE_BYTES:
        return list(range(0, size, SAMPLE_BYTES))
    return [last * number // (samples - 1) for number in range(samples)]
