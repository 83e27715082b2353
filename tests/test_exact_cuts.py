"""Encoding by the compiled BPE: ids equal those of sentencepiece, on texts that try to break a cut."""

import inspect
import math
import pickle
import random
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import sentencepiece
from helpers.corpus import REAL, TRAPS, sentencepiece_dir, words
from helpers.tokenizers import folder_with, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from ascendspeed.data.preprocess import EncoderConfig, preprocess
from ascendspeed.tokenization import compiled_bpe, sentencepiece_encoder, tokenizer
from ascendspeed.tokenization.sentencepiece_encoder import SentencePieceEncoder
from ascendspeed.tokenization.text_cuts import NoExactCutsError, read_model

SYMBOLS = ["<|im_end|>", "[UNUSED_1]", "ab ab", "\n\n", "aba"]
DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 1])
REAL_ONES = [name for name in ("internlm", "internlm2") if (REAL / name).is_dir()]
MADE = ["plain", "symbols", "prefix", "unused", "spaces", "equal", "bits", "reserved"]
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


def equal_scores(proto) -> None:
    """Gives many pieces the same score: of equal ones the leftmost is joined."""
    for piece in proto.pieces:
        piece.score = -(-piece.score // 64)


def odd_scores(proto) -> None:
    """Gives scores that are equal, not ordered or lower than all as numbers, but not by their bits."""
    generator = random.Random(4)
    for piece in proto.pieces:
        piece.score = generator.choice([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45])


def nest_symbols(proto) -> None:
    for length in range(1, 66):
        proto.pieces.add(piece="\u0416" * length, type=4, score=0.0)


def reserve_characters(proto) -> None:
    """Makes a piece of a single character CONTROL, and another UNUSED."""
    letters = [piece for piece in proto.pieces if piece.type == 1 and piece.piece in ("b", "e")]
    for piece, kind in zip(letters, (3, 5), strict=True):
        piece.type = kind


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    plain = trained()
    made = {
        "plain": plain,
        "symbols": trained(user_defined_symbols=SYMBOLS),
        "prefix": plain + DUMMY_PREFIX,
        "unused": changed(plain, unuse),
        "spaces": changed(plain, plain_spaces),
        "equal": changed(plain, equal_scores),
        "bits": changed(plain, odd_scores),
        "reserved": changed(plain, reserve_characters),
    }
    return made | {name: (REAL / name / "tokenizer.model").read_bytes() for name in REAL_ONES}


class Pair:
    """Sentencepiece, and the encoder that is compared with it."""

    def __init__(self, model: bytes, path="tokenizer.model") -> None:
        self.reference = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.encoder = SentencePieceEncoder(self.reference, self.reference, model, path)
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
def always_compiled(monkeypatch):
    """Every text is encoded by compiled code, however short, in small passes."""
    for name in ("MIN_CHARACTERS", "SMALL_BATCH"):
        monkeypatch.setattr(sentencepiece_encoder, name, 0)
    monkeypatch.setattr(sentencepiece_encoder, "BLOCK", 200)


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
    pair.assert_equal(["return the value"])
    rows, columns, is_cut = pair.encoder._words._cuts
    is_cut[rows[ord("t")] + columns[ord("h")]] = True
    with pytest.raises(AssertionError, match="return the value"):
        pair.assert_equal(["return the value"])


def test_another_order_of_joins_is_seen(models):
    """Control: with the opposite order of scores, ids differ."""
    pair, text = Pair(models["plain"]), inspect.getsource(random.Random)
    pair.assert_equal([text])
    ranks = pair.encoder._words._vocabulary[3]
    ranks[:] = ranks.max() + 1 - ranks
    with pytest.raises(AssertionError, match="class Random"):
        pair.assert_equal([text])


@pytest.mark.parametrize("name", MADE)
def test_every_pair_of_neighbours_in_a_piece_is_no_cut(pairs, models, name):
    pairs[name].assert_equal(["a"])
    cuts = pairs[name].encoder._words._cuts

    def words(text: str) -> int:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return len(compiled_bpe.word_ends(codes, np.array([len(codes)]), *cuts))

    proto = sentencepiece_model_pb2.ModelProto.FromString(models[name])
    for piece in proto.pieces:
        if piece.type in (1, 4, 5):
            assert words(piece.piece) == 1
            assert words(piece.piece.replace("\u2581", " ")) == 1
    assert words("\x01\x02a\u0416") == 4


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
        (nest_symbols, "more than 64 user-defined symbols"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"\(nmt_nfkc\) changes characters"),
    ],
)
def test_other_models_keep_sentencepiece(models, change, reason, caplog):
    model = trained(**change) if isinstance(change, dict) else changed(models["plain"], change)
    with pytest.raises(NoExactCutsError, match=reason):
        read_model(model)
    pair = Pair(model, "folder/tokenizer.model")
    with caplog.at_level("INFO"):
        pair.encoder.log_slowness()
        for _ in range(2):
            pair.assert_equal([*TRAPS, "  ﬁ  Ａ  中文 \u0416\u0416 ", "\u0416" * 200])
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "note: folder/tokenizer.model: sentencepiece encodes every text itself"
    ]


def test_without_numba_sentencepiece_encodes_everything(models, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "ascendspeed.tokenization.word_encoder", None)
    pair = Pair(models["plain"])
    with caplog.at_level("INFO"):
        pair.assert_equal(["return the value"])
    assert pair.encoder._words is None
    assert "word_encoder" in caplog.text


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_damaged_code_is_compiled_again(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def add(a, b):
        return a + b

    assert compiled_bpe.Compiled(add)(1, 2) == 3
    (kept,) = tmp_path.rglob(f"*.{suffix}")
    kept.write_bytes(kept.read_bytes()[:9])
    with pytest.raises(pickle.UnpicklingError):  # control
        numba.njit(cache=True, nogil=True)(add)(1, 2)
    assert compiled_bpe.Compiled(add)(1, 2) == 3
    assert not [*tmp_path.rglob("*.nbi")]
    assert compiled_bpe.Compiled(add)(1, 2) == 3
    assert [*tmp_path.rglob("*.nbi")]


def test_an_error_of_a_function_itself_is_raised(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    function = compiled_bpe.Compiled(lambda number: 1 // number)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            function(0)


def test_without_jit_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(ImportError, match="NUMBA_DISABLE_JIT"):
        runpy.run_path(compiled_bpe.__file__)


@pytest.mark.parametrize(
    ("name", "word"), [("plain", "-" * 300), ("reserved", "bbeeb"), ("unused", "return"), ("plain", "a\0")]
)
def test_words_that_sentencepiece_encodes_itself(models, name, word):
    """Words beyond the limit, control pieces of one character, unused pieces and NUL; each once in a pass."""
    pair = Pair(models[name])
    pair.assert_equal(["a"])
    model, encoded = pair.encoder._words._model, []

    def encode(words, **settings):
        encoded.append(words)
        return model.encode_as_numpy(words, **settings)

    pair.encoder._words._model = SimpleNamespace(encode_as_numpy=encode)
    pair.assert_equal([f"{word}\n{word} x", word, "", f"a {word}a", "-" * 128])
    assert encoded
    assert all(len(words) == len(set(words)) for words in encoded)
    encoded.clear()
    pair.assert_equal(["-" * 128])
    assert not encoded


def test_equal_words_of_a_pass(models, monkeypatch):
    """The ids of a word are copied when it occurs again, also where several words share a place."""
    monkeypatch.setattr(sentencepiece_encoder, "BLOCK", 1 << 20)
    pair = Pair(models["plain"])
    generator = random.Random(5)
    numbers = [f" {generator.getrandbits(26):x}" for _ in range(30_000)]
    pair.assert_equal(["".join(generator.choices(numbers, k=60_000)) for _ in range(2)])


def test_a_text_that_is_no_unicode_is_refused_as_before(models):
    pair = Pair(models["plain"])
    for encode in (pair.encoder.encode, pair.reference.encode_as_numpy):
        with pytest.raises(TypeError):
            encode(["a\ud800b"])
    pair.assert_equal(["a"])


def test_a_second_thread_does_not_wait(models):
    pair = Pair(models["plain"])
    with pair.encoder._lock:
        pair.assert_equal(["text"])
    assert pair.encoder._words is None
    pair.assert_equal(["another text"])
    assert pair.encoder._words is not None


def test_several_threads(models):
    pair = Pair(models["plain"])
    generator = random.Random(6)
    batches = [[pair.text(generator, 200) for _ in range(20)] for _ in range(8)]
    pair.assert_equal(["text"])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pair.assert_equal, batches))


@pytest.mark.parametrize("legacy", [True, False])
def test_text_behind_added_tokens(models, tmp_path, legacy, monkeypatch):
    config = {"legacy": legacy, "added_tokens_decoder": {"5000": {"content": "<x>"}}}
    folder = folder_with(tmp_path / "t", models["prefix"], config)
    texts = ["a<x>b c", "<x>", "<x>  b", "a", " <x> <x>"]
    actual = tokenizer.load(folder).encode_batch(texts)
    monkeypatch.setattr(sentencepiece_encoder, "MIN_CHARACTERS", 1 << 40)
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
    monkeypatch.setattr(sentencepiece_encoder, "MIN_CHARACTERS", 1 << 40)
    preprocess([tmp_path / "a.txt"], str(tmp_path / "bare"), config)
    for suffix in ("bin", "idx", "meta"):
        files = [tmp_path / f"{name}_text_document.{suffix}" for name in ("cached", "bare")]
        assert files[0].read_bytes() == files[1].read_bytes()
