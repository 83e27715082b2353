"""Hash of how a tokenizer encodes text: equal for every form of the same tokenizer, whatever its files and
the names of its unused tokens."""

import hashlib

import numpy as np

from ascendspeed.tokenization.tokenizer import Tokenizer

PROBE = (
    "The quick brown fox jumps over the lazy dog, and 1234567890 is 3.14159 times 392996100.",
    "Tokenization, internationalisation; pre-training (2023) [see: https://example.org/a_b?c=d&e=f#g]!",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    '{"name": "value", "list": [1, 2.5e-3, null, true], "text": "\\u4e2d"}\t\t  \n\n   end',
    "人工智能是研究、开发用于模拟、延伸和扩展人的智能的理论、方法、技术及应用系统的一门新的技术科学。",
    "日本語のテキスト、한국어 텍스트, русский текст, ελληνικά, العربية, हिन्दी, ñandú, Größe, façade, 🦙🚀",
    "".join(map(chr, range(0x20, 0x7F))),
)
"""Texts of several languages, numbers, code and white space; two vocabularies encode some of them
differently."""


def hash_encoding(tokenizer: Tokenizer) -> str:
    """Returns a SHA-256 of the ids of the probe texts."""
    digest = hashlib.sha256()
    for ids in tokenizer.encode_batch(PROBE):
        digest.update(np.append(ids, -1).astype("<i8").tobytes())
    return digest.hexdigest()
