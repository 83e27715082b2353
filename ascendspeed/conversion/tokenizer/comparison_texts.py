"""Texts on which tokenizers differ, and the comparison of a tokenizer.json with sentencepiece on them."""

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
    "<s>a</s> <unk> <pad> <bos> <0x41> <|im_start|>user\n<|im_end|> [UNUSED_TOKEN_145] [INST] <eoh> <eoa> <|User|>:hi\n<|Bot|>:",
    "http://example.org/a?b=c&d=%20 C:\\x\\y 'q' \"r\" `s` $t$ <html> &amp;",
    "x" * 300,
    "é" * 150 + "你" * 150,
)
RUNS = " \n\t.-=_*#/\\0aA1哈。!?)(\"'"
ALPHABET = "ab 1\n\t▁你 é😀.-_<>/\\\"'\r\0" + "\u200d"


def texts(pieces: Any, ranked: Sequence[Merge]) -> Iterator[str]:
    """The lines above, runs, noise, every piece alone, user-defined ones in company, and where merges of one score compete."""
    yield from LINES
    yield from (
        first * count + last
        for first in RUNS
        for count in (*range(1, 40), 63, 64, 65, 130)
        for last in ("", "x")
    )
    dice = random.Random(0)
    yield from ("".join(dice.choices(ALPHABET, k=dice.randint(1, 40))) for _ in range(500))
    some = [piece.piece.replace("▁", " ") for piece in dice.sample(list(pieces), min(2000, len(pieces)))]
    yield from ("".join(dice.choices(some, k=5)) for _ in range(500))
    yield from (piece.piece.replace("▁", " ") for piece in pieces if piece.type == NORMAL)
    for piece in pieces:
        if piece.type == USER_DEFINED:
            yield from (
                around.format(piece.piece.replace("▁", " ")) for around in ("{}", "a {0}{0} b {0}x{0}")
            )
    for _, tied in groupby(ranked, attrgetter("score")):
        yield from (text.replace("▁", " ") for text in _contested(list(tied)))


def _contested(tied: Sequence[Merge]) -> Iterator[str]:
    """Three symbols of which two merges of one score want the middle one."""
    lefts = {merge.left for merge in tied}
    for first in tied:
        if first.right in lefts:
            yield from (
                f"{first.left}{first.right}{second.right}" for second in tied if second.left == first.right
            )


def compare(path: Path, ours: Any, samples: Collection[str], found_raw: Collection[str]) -> None:
    """Raises `Inexact` for the first sample whose ids, or whose way back, differ between the model at `path` and a tokenizer.json.

    `ours`: the latter, as the `tokenizers.Tokenizer` that was made of it. `found_raw`: strings that are declared beside the model;
    samples that hold one are left out, for sentencepiece does not know them.
    """
    import sentencepiece

    sentencepiece.set_min_log_level(2)  # InternLM's unused NUL piece would be warned about
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours.no_truncation()
    ours.no_padding()
    ours.encode_special_tokens = True
    samples = [sample for sample in samples if not any(token in sample for token in found_raw)]
    ids = theirs.encode(samples)
    encoded = ours.encode_batch_fast(samples, add_special_tokens=False)
    back = zip(
        theirs.decode(ids),
        ours.decode_batch([e.ids for e in encoded], skip_special_tokens=False),
        strict=True,
    )
    for sample, mine, expected, (a, b) in zip(samples, encoded, ids, back, strict=True):
        if mine.ids != expected:
            raise InexactTokenizerError(
                f"gives {expected[:8]} for {sample[:40]!r}, where tokenizer.json gives {mine.ids[:8]}"
            )
        if (
            a != b and theirs.unk_id() not in expected
        ):  # sentencepiece shows what is unknown by a sign of its own
            raise InexactTokenizerError(
                f"reads its ids of {sample[:40]!r} back as {a[:40]!r}, tokenizer.json as {b[:40]!r}"
            )
