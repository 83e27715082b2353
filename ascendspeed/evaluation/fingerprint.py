"""Hash that identifies a tokenizer. For a model, see `conversion.weights_identity`."""

import hashlib
from pathlib import Path

from ascendspeed.tokenization.tokenizer import TOKENIZER_CLASSES


def hash_tokenizer(folder: Path) -> str:
    """Returns a SHA-256 of the vocabulary file in a folder."""
    name = next(name for name in TOKENIZER_CLASSES if (folder / name).is_file())
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()
