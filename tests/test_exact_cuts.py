"""Encoding through the cache of words: ids equal those of sentencepiece, on texts that try to break a cut."""

import random

import numpy as np
import pytest
import sentencepiece
from helpers.corpus import REAL, TRAPS, sentencepiece_dir, words
from helpers.tokenizers import folder_with, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from ascendspeed.data.preprocess import EncoderConfig, preprocess
from ascendspeed.tokenization import cached_encoder, tokenizer, word_cache
from ascendspeed.tokenization.cached_encoder import CachedEncoder, Pace
from ascendspeed.tokenization.text_cuts import NoExactCutsError, TextCuts
from ascendspeed.tokenization.word_table import WordTable, word_keys

SYMBOLS = ["<|im_end|>", "[UNUSED_1]", "ab ab", "\n\n", "aba"]
DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 1])
REAL_ONES = [name for name in ("internlm", "internlm2") if (REAL / name).is_dir()]
MADE = ["plain", "symbols", "prefix", "unused", "spaces"]
ODD = [
    "\0",
    "\x01",
    "\x02",
    " ",
    "  ",
    "\u2581",
    "\n",
    "\t",
    "\r\n",
    "\u3000",
    "é",
    "e\u0301",
    "中文",
    "🦙",
    "\ufdd0",
]
ODD += [
    "\U0010ffff",
    "\u200d",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "ab ab",
    "abab",
    "aba",
    "|im_end|",
    "a",
    "b",
]


def changed(model: bytes, change) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    change(proto)
    return proto.SerializeToString()


def unuse(proto) -> None:
    """Makes every third piece of several characters UNUSED: it is joined, then split again."""
    longer = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    for piece in longer[::3]:
        piece.type = 5


def plain_spaces(proto) -> None:
    proto.normalizer_spec.escape_whitespaces = False


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    plain = trained()
    made = {
        "plain": plain,
        "symbols": trained(user_defined_symbols=SYMBOLS),
        "prefix": plain + DUMMY_PREFIX,
        "unused": changed(plain, unuse),
        "spaces": changed(plain, plain_spaces),
    }
    return made | {name: (REAL / name / "tokenizer.model").read_bytes() for name in REAL_ONES}


class Pair:
    """Sentencepiece, and the encoder that is compared with it."""

    def __init__(self, model: bytes, path="tokenizer.model") -> None:
        self.reference = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.encoder = CachedEncoder(self.reference, self.reference, model, path)
        pieces = map(self.reference.id_to_piece, range(self.reference.get_piece_size()))
        self.fragments = [*pieces, *ODD]

    def assert_equal(self, texts: list[str]) -> None:
        expected = self.reference.encode_as_numpy(texts, num_threads=1)
        actual = self.encoder.encode(texts)
        assert len(actual) == len(expected)
        for text, ids, own in zip(texts, actual, expected, strict=True):
            assert ids.dtype == np.int32
            assert ids.tolist() == own.tolist(), text

    def text(self, generator: random.Random, length: int) -> str:
        """A text of pieces, whole or in part, and odd characters."""
        parts = []
        for _ in range(length):
            part = generator.choice(self.fragments if generator.random() < 0.7 else ODD)
            start = generator.randrange(len(part)) if generator.random() < 0.3 else 0
            parts.append(part[start : generator.randint(start, len(part))] if start else part)
        return "".join(parts)


@pytest.fixture(scope="module")
def pairs(models) -> dict[str, Pair]:
    return {name: Pair(model) for name, model in models.items()}


@pytest.fixture(autouse=True)
def always_cached(monkeypatch):
    """Every text goes through the cache, however short, in small passes."""
    for name in ("MIN_CHARACTERS", "SMALL_BATCH"):
        monkeypatch.setattr(cached_encoder, name, 0)
    monkeypatch.setattr(cached_encoder, "BLOCK", 200)
    monkeypatch.setattr(cached_encoder, "WORDS", 40)
    monkeypatch.setattr(Pace, "uses_cache", lambda pace, characters: True)


@pytest.mark.breadth
@pytest.mark.parametrize("name", MADE + REAL_ONES)
def test_ids_of_texts_made_of_pieces(pairs, name):
    generator = random.Random(7)
    pairs[name].assert_equal(
        ["", *TRAPS, *words(30), "", *(pairs[name].text(generator, 12) for _ in range(150)), ""]
    )
    assert pairs[name].encoder._words is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE + REAL_ONES)
def test_ids_of_many_texts_made_of_pieces(pairs, name):
    generator = random.Random(8)
    for _ in range(20):
        pairs[name].assert_equal([pairs[name].text(generator, generator.randint(1, 40)) for _ in range(1000)])


def check_with_hypothesis(pair: Pair, examples: int) -> None:
    fragment = st.one_of(st.sampled_from(pair.fragments), st.sampled_from(ODD), st.characters(codec="utf-8"))
    texts = st.lists(st.lists(fragment, max_size=15).map("".join), max_size=4)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(texts)
    def equal(batch):
        pair.assert_equal(batch)

    equal()


@pytest.mark.breadth
@pytest.mark.parametrize("name", MADE + REAL_ONES)
def test_ids_of_hypothesis_texts(pairs, name):
    check_with_hypothesis(pairs[name], 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE + REAL_ONES)
def test_ids_of_many_hypothesis_texts(pairs, name):
    check_with_hypothesis(pairs[name], 1000)


def test_a_cut_inside_a_piece_is_seen(models):
    """Control: with one position cut that a piece joins, ids differ."""
    pair = Pair(models["plain"])
    pair.encoder.prepare()
    pair.assert_equal(["return the value"])
    cuts = pair.encoder._words.cuts
    cuts._is_cut[cuts._row[ord("t")] + cuts._column[ord("h")]] = True
    with pytest.raises(AssertionError, match="return the value"):
        pair.assert_equal(["return the value"])


@pytest.mark.parametrize("name", MADE)
def test_every_pair_of_neighbours_in_a_piece_is_no_cut(models, name):
    cuts = TextCuts(models[name])
    proto = sentencepiece_model_pb2.ModelProto.FromString(models[name])
    for piece in proto.pieces:
        if piece.type in (1, 4, 5):
            assert not cuts.find(piece.piece).any()
            assert not cuts.find(piece.piece.replace("\u2581", " ")).any()
    assert cuts.find("\x01\x02a\u0416").all()


def proto_with(field: str, value) -> object:
    part, name = field.split(".")
    return lambda proto: setattr(getattr(proto, part), name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (proto_with("trainer_spec.model_type", 1), "not a BPE model"),
        (proto_with("normalizer_spec.remove_extra_whitespaces", True), "removes extra spaces"),
        (proto_with("trainer_spec.treat_whitespace_as_suffix", True), "as suffixes"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"\(nmt_nfkc\) changes characters"),
    ],
)
def test_other_models_keep_sentencepiece(models, change, reason, caplog):
    model = trained(**change) if isinstance(change, dict) else changed(models["plain"], change)
    with pytest.raises(NoExactCutsError, match=reason):
        TextCuts(model)
    pair = Pair(model, "folder/tokenizer.model")
    with caplog.at_level("INFO"):
        for _ in range(2):
            pair.assert_equal([*TRAPS, "  ﬁ  Ａ  中文 \u0416\u0416 "])
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "note: folder/tokenizer.model: sentencepiece encodes every text anew"
    ]


def test_a_full_cache_begins_anew(models, monkeypatch):
    pair = Pair(models["plain"])
    monkeypatch.setattr(word_cache, "MAX_WORDS", 40)
    pair.encoder.prepare()
    clears = []
    clear = pair.encoder._words._clear
    monkeypatch.setattr(pair.encoder._words, "_clear", lambda: (clears.append(1), clear()))
    generator = random.Random(2)
    for _ in range(10):
        pair.assert_equal([pair.text(generator, 20) for _ in range(4)])
    assert len(clears) > 2
    assert pair.encoder._words._counts.size < 40 + 200


def test_long_words_are_kept_too(models):
    pair = Pair(models["plain"])
    long_word = "-" * 300
    pair.assert_equal([f"{long_word}\n", f"x{long_word}", "-" * 40, "-" * 16, "-" * 15])
    size = pair.encoder._words._counts.size
    pair.assert_equal([f"{long_word}\n", "-" * 40])
    assert pair.encoder._words._counts.size == size


def test_a_text_that_is_no_unicode_is_refused_as_before(models):
    pair = Pair(models["plain"])
    for encode in (pair.encoder.encode, pair.reference.encode_as_numpy):
        with pytest.raises(TypeError):
            encode(["a\ud800b"])
    pair.assert_equal(["a"])


def test_a_second_thread_does_not_wait(models):
    pair = Pair(models["plain"])
    pair.assert_equal(["text"])
    with pair.encoder._lock:
        pair.assert_equal(["another text"])


@pytest.mark.parametrize("legacy", [True, False])
def test_text_behind_added_tokens(models, tmp_path, legacy, monkeypatch):
    config = {"legacy": legacy, "added_tokens_decoder": {"5000": {"content": "<x>"}}}
    folder = folder_with(tmp_path / "t", models["prefix"], config)
    texts = ["a<x>b c", "<x>", "<x>  b", "a", " <x> <x>"]
    actual = tokenizer.load(folder).encode_batch(texts)
    monkeypatch.setattr(cached_encoder, "MIN_CHARACTERS", 1 << 40)
    expected = tokenizer.load(folder).encode_batch(texts)
    assert [ids.tolist() for ids in actual] == [ids.tolist() for ids in expected]


def test_files_are_equal_byte_for_byte(tmp_path, monkeypatch):
    folder = sentencepiece_dir(tmp_path / "t")
    generator = random.Random(3)
    rows = [
        "".join(generator.choices([*TRAPS, *words(40)], k=30)).replace("\0", "").replace("\n", " ")
        for _ in range(50)
    ]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    config = EncoderConfig(str(folder), "GeneralPretrainHandler", append_eod=True)
    preprocess([tmp_path / "a.txt"], str(tmp_path / "cached"), config)
    monkeypatch.setattr(cached_encoder, "MIN_CHARACTERS", 1 << 40)
    preprocess([tmp_path / "a.txt"], str(tmp_path / "bare"), config)
    for suffix in ("bin", "idx", "meta"):
        files = [tmp_path / f"{name}_text_document.{suffix}" for name in ("cached", "bare")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_pace_takes_the_faster_way_and_tries_the_other(monkeypatch):
    monkeypatch.undo()
    pace = Pace()
    assert pace.uses_cache(10)
    pace.record(True, 2.0, cached_encoder.WARM_UP)
    assert not pace.uses_cache(cached_encoder.WARM_UP)  # not measured yet
    pace.record(False, 1.0, cached_encoder.WARM_UP)
    ways = []
    for _ in range(300):
        ways.append(pace.uses_cache(cached_encoder.WARM_UP))
        pace.record(ways[-1], 2.0 if ways[-1] else 1.0, cached_encoder.WARM_UP)
    assert 1 <= sum(ways) <= 300 / 30
    for _ in range(300):
        ways.append(pace.uses_cache(cached_encoder.WARM_UP))
        pace.record(ways[-1], 0.2 if ways[-1] else 1.0, cached_encoder.WARM_UP)
    assert sum(ways[-50:]) > 40


def test_word_table_equals_a_dict():
    generator = random.Random(1)
    texts = list({generator.randbytes(generator.randint(1, 15)) for _ in range(100)})
    texts += [b"a", b"a\0", b"\0", b"\0\0", b"\0" * 8, b"\0" * 15]
    data = b"".join(texts)
    lengths = np.array([len(text) for text in texts])
    low, high = word_keys(data, np.cumsum(lengths) - lengths, lengths)
    table = WordTable(8)  # nearly half full: words meet in the same slots
    half = len(texts) // 2
    table.add(low[:half], high[:half], np.arange(half, dtype=np.int32))
    assert table.find(low, high).tolist() == [*range(half), *[-1] * (len(texts) - half)]
    table.add(low[half:], high[half:], np.arange(half, len(texts), dtype=np.int32))
    assert table.find(low, high).tolist() == [*range(len(texts))]
    table.clear()
    assert (table.find(low, high) == -1).all()
