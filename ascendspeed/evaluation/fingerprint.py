"""Hash that identifies a tokenizer, for evaluation reports. That of a model is `conversion.weights_identity.full_bytes`."""

import hashlib
from pathlib import Path

from ascendspeed.tokenization.tokenizer import TOKENIZER_CLASSES


def of_tokenizer(folder: Path) -> str:
    """SHA-256 of the vocabulary file in a folder."""
    name = next(name for name in TOKENIZER_CLASSES if (folder / name).is_file())
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()
