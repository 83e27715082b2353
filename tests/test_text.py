"""Incremental detokenization equals decoding at once; stop strings are found however the text is split."""

import io
import json
import random
from itertools import pairwise

import pytest
import sentencepiece
import tokenizers
from helpers.corpus import REAL, TRAPS, json_dir, sentencepiece_dir, words
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.detokenizer import (
    IncrementalDecoder,
    StopStringFilter,
    TextStream,
    decode_until_stop,
    incomplete_utf8,
)
from ascendspeed.utils.errors import UserError

TEXTS = [*TRAPS, *words(3), "中文🦙é", "👩‍👩‍👧‍👦 family", "  two spaces", "\u4e00" * 5, "naïve café ½"]


def with_prefix(folder):
    """A sentencepiece model like Llama's, with a dummy prefix, one added token and one control token."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words(300)),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {"400": {"content": "<tool>", "special": False}, "401": {"content": "<|end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder


def with_fallback(folder):
    """A tokenizer.json converted from sentencepiece: bytes are tokens such as <0x41>, decoded in runs."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "the",
        "a",
        "▁b",
        "中",
        ".",
    ]
    parts = tokenizers.decoders
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    model.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<s>", "</s>"])
    model.add_tokens(["<tool>"])
    folder.mkdir(parents=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


KINDS = {
    "internlm-like": lambda folder: sentencepiece_dir(folder),
    "prefix": with_prefix,
    "byte-level": lambda folder: json_dir(folder),
    "byte-fallback": with_fallback,
    "internlm": lambda folder: REAL / "internlm",
    "internlm2": lambda folder: REAL / "internlm2",
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Tokenizers of every kind by name; the published ones if they are available."""
    folders = {name: make(tmp_path_factory.mktemp("tokenizers") / name) for name, make in KINDS.items()}
    return {name: tokenizer.load(folder) for name, folder in folders.items() if folder.is_dir()}


def streamed(tok, ids):
    decoder = IncrementalDecoder(tok)
    return "".join([*(decoder.push(i) for i in ids), decoder.finish()])


# Ids of a vocabulary: any, those of single bytes (3 to 258 in these), and the first ones.
IDS = st.lists(
    st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 300), st.integers(3, 258)), max_size=24
)


@pytest.mark.breadth
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=80)
@given(numbers=IDS)
@example([231, 187, 176])  # 中 as bytes
@example([231, 187, 0, 176, 231, 187, 68])  # broken by another token, and never completed
@example([1, 2, 230])
def test_stream_equals_decoding_at_once(kinds, name, numbers):
    if name not in kinds:
        pytest.skip("no real tokenizers beside the repository")
    tok = kinds[name]
    ids = [int(n * tok.vocab_size) if isinstance(n, float) else n % tok.vocab_size for n in numbers]
    assert streamed(tok, ids) == tok.decode(ids)


@pytest.mark.parametrize("name", KINDS)
def test_text_streams(kinds, name):
    if name not in kinds:
        pytest.skip("no real tokenizers beside the repository")
    tok = kinds[name]
    for text in TEXTS:
        ids = tok.encode(text).tolist()
        assert streamed(tok, ids) == tok.decode(ids)
        if name in ("internlm-like", "internlm", "internlm2", "byte-level"):
            assert streamed(tok, ids) == text


def test_control_token_by_token_decoding_is_another_text(kinds):
    """Decoding token by token loses partial characters and leading spaces; the comparison shows it."""
    for name, text in (("internlm-like", "🦙"), ("byte-level", "🦙"), ("prefix", "Document 3 says")):
        ids = kinds[name].encode(text).tolist()
        assert len(ids) > 1
        assert "".join(kinds[name].decode([i]) for i in ids) != kinds[name].decode(ids)


@pytest.mark.parametrize("name", ["prefix", "byte-fallback"])
def test_spaces_where_a_text_begins(kinds, name):
    """A space is dropped at the beginning, and after an added token that resets the decoder."""
    tok = kinds[name]
    space, word, tool, end = (
        tok.token_to_id(token)
        for token in ("▁", "▁the" if name == "byte-fallback" else "▁says", "<tool>", "</s>")
    )
    assert None not in (space, word, tool, end)
    expected = set()
    for ids in (
        [space, word, word],
        [space, space, word],
        [word, tool, word],
        [tool, space, word],
        [word, end, tool, end, word],
    ):
        assert streamed(tok, ids) == tok.decode(ids)
        expected.add(tok.decode(ids) == "".join(tok.decode([i]) for i in ids))
    assert False in expected  # control: decoding one by one loses spaces


def test_half_a_character_is_held_back(kinds):
    tok = kinds["internlm-like"]
    decoder = IncrementalDecoder(tok)
    shown = [decoder.push(3 + byte) for byte in "中é".encode()]
    assert shown == ["", "", "中", "", "é"]
    assert decoder.finish() == ""
    broken = IncrementalDecoder(tok)
    assert [broken.push(3 + byte) for byte in "中".encode()[:2]] == ["", ""]
    assert broken.push(3 + ord("a")) == tok.decode([3 + 0xE4, 3 + 0xB8]) + "a"


def test_unfinished():
    assert incomplete_utf8(b"") == incomplete_utf8(b"abc") == incomplete_utf8("中".encode()) == b""
    assert incomplete_utf8(b"a\xe4\xb8") == b"\xe4\xb8"
    assert incomplete_utf8(b"\xf0\x9f\xa6") == b"\xf0\x9f\xa6"
    assert incomplete_utf8(b"\xff") == incomplete_utf8(b"\x80\x80\x80\x80") == b""


def test_an_id_that_is_no_token(kinds):
    decoder = IncrementalDecoder(kinds["internlm-like"])
    with pytest.raises(UserError, match="no token has the id 99999"):
        decoder.push(99999)


def test_work_does_not_grow_with_the_text(kinds, monkeypatch):
    """A long text decodes a few ids per token in total."""
    tok = kinds["internlm-like"]
    random.seed(0)
    ids = [random.randrange(3, 400) for _ in range(3000)]
    expected, decoded_lengths = tok.decode(ids), []
    decode = tok.decode
    monkeypatch.setattr(tok, "decode", lambda ids: decoded_lengths.append(len(ids)) or decode(ids))
    assert streamed(tok, ids) == expected
    assert sum(decoded_lengths) < 4 * len(ids)


STOPS = st.lists(st.text("ab\n中", min_size=1, max_size=4), min_size=1, max_size=3)


@given(text=st.text("ab\n中c", max_size=20), stops=STOPS, cuts=st.lists(st.integers(0, 20), max_size=8))
def test_stop_strings_however_the_text_is_cut(text, stops, cuts):
    ends = sorted({0, len(text), *(c for c in cuts if c <= len(text))})
    stop_filter = StopStringFilter(stops)
    shown = "".join([*(stop_filter.push(text[a:b]) for a, b in pairwise(ends)), stop_filter.finish()])
    # Reference: the shortest prefix of the text that ends in a stop string, without the longest such string.
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            assert (shown, stop_filter.stopped) == (text[: end - max(map(len, ending))], True)
            break
    else:
        assert (shown, stop_filter.stopped) == (text, False)


def test_the_beginning_of_a_stop_string_is_held_back():
    stop_filter = StopStringFilter(["END", "\n\n"])
    assert [stop_filter.push(text) for text in ("a E", "N", "x\n", "b", "EN", "D and more")] == [
        "a ",
        "",
        "ENx",
        "\nb",
        "",
        "",
    ]
    assert stop_filter.stopped
    assert stop_filter.push("more") == stop_filter.finish() == ""
    free = StopStringFilter([])
    assert free.push("END") == "END"


@pytest.mark.parametrize("name", ["internlm-like", "prefix", "byte-level"])
def test_stop_string_over_tokens(kinds, name):
    """For every position and length of a stop string, the stream ends at the token that completes it."""
    tok = kinds[name]
    text = "Document 7 says 中文🦙 and more." if name != "prefix" else "Document 7 says and more."
    ids = tok.encode(text).tolist()
    for start in range(1, len(text)):
        for length in (1, 3, 7):
            stop = text[start : start + length]
            stream = TextStream(tok, [stop])
            used = next(
                (n for n, i in enumerate(ids, 1) if stream.push(i) is not None and stream.stopped), None
            )
            stream.finish()
            assert stream.text == text[: text.index(stop)]
            assert used is not None
            assert stop not in decode_until_stop(tok, ids[: used - 1], [stop])[0]
            assert decode_until_stop(tok, ids, [stop]) == (stream.text, True)
    assert decode_until_stop(tok, ids, ["absent"]) == (text, False)
