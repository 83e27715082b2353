"""Adversarial strings for comparing a `tokenizer.json` with sentencepiece, and the comparison."""

import random
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from ascendspeed.conversion.tokenizer.sentencepiece_bpe import (
    NORMAL,
    USER_DEFINED,
    InexactTokenizerError,
    Merge,
)

LINES = (
    "",
    " ",
    "  ",
    "Hello  world\n 123\n    \n\t你好",
    " leading",
    "trailing ",
    "\t\t x",
    "1234567890 3.14 ١٢٣ ４５",
    "naïve café cafe\u0301 ﬁ Å Å",
    "日本語テスト 한국어 中文，全角　空格：“引号”……——",
    "😀 🇨🇳 👨‍👩‍👧‍👦 ❤️ 🏳️‍🌈 👍🏽",
    "a\u200bb\u200d\ufeffc\u00a0d\u2028e\u0085f\u3000g",
    "العربية ـــ עברית \u202eabc\u202c हिन्दी ไทย ελληνικά",
    "\0 \x01\x02\x1b[31m\x7f a\0b",
    "\r\n\r\n win\r mac",
    "def f(x):\n    return x  # c\n\n\n\tif (a[i] != b[j]) && !c: {};\n",
    "▁under ▁ x▁▁y ▁▁▁",
    "\ud7ff\ue000\uf8ff\ufffd\uffff\U00010000\U0001f9ff\U0010ffff",
    "𠀀𪚥𝒳 ḁ̂̃ Z̸̢a̶l̵g̷o",
    "<s>a</s> <unk> <pad> <bos> <0x41> <|im_start|>user\n<|im_end|> [UNUSED_TOKEN_145] [INST] <eoh> <eoa> "
    "<|User|>:hi\n<|Bot|>:",
    "http://example.org/a?b=c&d=%20 C:\\x\\y 'q' \"r\" `s` $t$ <html> &amp;",
    "x" * 300,
    "é" * 150 + "你" * 150,
)
RUNS = " \n\t.-=_*#/\\0aA1哈。!?)(\"'"
ALPHABET = "ab 1\n\t▁你 é😀.-_<>/\\\"'\r\0" + "\u200d"


def texts(pieces: Any, ranked: Sequence[Merge]) -> Iterator[str]:
    """Yields fixed lines, runs of one character, noise, single pieces, user-defined pieces in context, and
    competing merges.
    """
    yield from LINES
    for char in RUNS:
        for count in (*range(1, 40), 63, 64, 65, 130):
            yield char * count
            yield char * count + "x"
    rng = random.Random(0)
    for _ in range(500):
        yield "".join(rng.choices(ALPHABET, k=rng.randint(1, 40)))
    sample = [_text_of(piece) for piece in rng.sample(list(pieces), min(2000, len(pieces)))]
    for _ in range(500):
        yield "".join(rng.choices(sample, k=5))
    yield from (_text_of(piece) for piece in pieces if piece.type == NORMAL)
    for piece in pieces:
        if piece.type == USER_DEFINED:
            text = _text_of(piece)
            yield text
            yield f"a {text}{text} b {text}x{text}"
    for _, tied in groupby(ranked, attrgetter("score")):
        yield from (text.replace("▁", " ") for text in _competing_texts(list(tied)))


def _text_of(piece: Any) -> str:
    return piece.piece.replace("▁", " ")


def _competing_texts(tied: Sequence[Merge]) -> Iterator[str]:
    """Yields sequences of three symbols of which two merges of equal score want the middle one."""
    lefts = {merge.left for merge in tied}
    for first in tied:
        if first.right in lefts:
            for second in tied:
                if second.left == first.right:
                    yield f"{first.left}{first.right}{second.right}"


def compare(path: Path, converted: Any, samples: Collection[str], foreign_strings: Collection[str]) -> None:
    """Raises `InexactTokenizerError` for the first sample whose ids or decoded text differ between two
    tokenizers.

    `path`: tokenizer.model. `converted`: the `tokenizers.Tokenizer` of the tokenizer.json. `foreign_strings`:
    strings that are declared beside the model and unknown to sentencepiece; samples that contain one are
    skipped.
    """
    import sentencepiece

    sentencepiece.set_min_log_level(2)  # no warning about InternLM's unused NUL piece
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    converted.no_truncation()
    converted.no_padding()
    converted.encode_special_tokens = True
    samples = [sample for sample in samples if not any(text in sample for text in foreign_strings)]
    expected_ids = original.encode(samples)
    actual_ids = [encoding.ids for encoding in converted.encode_batch_fast(samples, add_special_tokens=False)]
    expected_texts = original.decode(expected_ids)
    actual_texts = converted.decode_batch(actual_ids, skip_special_tokens=False)
    for i, sample in enumerate(samples):
        expected = expected_ids[i]
        if actual_ids[i] != expected:
            raise InexactTokenizerError(
                f"gives {expected[:8]} for {sample[:40]!r}, where tokenizer.json gives {actual_ids[i][:8]}"
            )
        # Unknown characters are decoded to a replacement of sentencepiece's own.
        if actual_texts[i] != expected_texts[i] and original.unk_id() not in expected:
            raise InexactTokenizerError(
                f"reads its ids of {sample[:40]!r} back as {expected_texts[i][:40]!r}, tokenizer.json as "
                f"{actual_texts[i][:40]!r}"
            )
