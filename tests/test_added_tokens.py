"""Added tokens in text: ids of transformers, for tokenizer.model with JSON files beside it and for
tokenizer.json."""

import json
import random
import runpy
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.preprocess import TOOL
from helpers.tokenizers import CHAT, folder_with, special, trained

from ascendspeed.config.schema import DataConfig
from ascendspeed.conversion.tokenizer import export
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.readers.shard import RowBatch
from ascendspeed.data.streaming import hf_dataset
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.added_tokens import AddedToken, AddedTokenSplitter
from ascendspeed.tokenization.detokenizer import IncrementalDecoder
from ascendspeed.tokenization.vocab_check import check_vocab_size

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
ADDED = {  # string -> what is not false
    "<think>": {},
    "</think>": {},
    "aspirin": {},
    "aspirins": {},
    "spirin": {},
    "|x": {},
    "[left]": {"lstrip": True},
    "[right]": {"rstrip": True},
    "wurd": {"single_word": True},
    "<|x|>": {"special": True},
    "<|turn|>": {"special": True, "lstrip": True, "rstrip": True},
}
FRAGMENTS = [
    *ADDED,
    "<s>",
    "</s>",
    "<unk>",
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "self",
    "哈",
    "\u2028",
    "\x1c",
    "_",
    ".",
    "1",
]


def write(folder: Path, names: dict[str, dict] = ADDED, settings: dict | None = None, **training) -> Path:
    model = trained(**training)
    first = 900
    decoder = {
        str(number): {"content": name, **FLAGS, "special": True} for name, number in special(model).items()
    }
    for number, (name, flags) in enumerate(names.items(), first):
        decoder[str(number)] = {"content": name, **FLAGS, "special": False, **flags}
    config = {
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        **(settings or {}),
    }
    return folder_with(folder, model, config)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    drawn = ["".join(rng.choices(FRAGMENTS, k=rng.randint(1, 12))) for _ in range(count)]
    return ["", "<think>", " <think> a", "aspirinsaspirin aspirin", "<|x|>", "a<|turn|> b", *drawn]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("added") / "t")


@pytest.fixture(scope="module")
def prefix_folder(tmp_path_factory) -> Path:
    """A tokenizer that puts a space before every text, as Llama's."""
    return write(tmp_path_factory.mktemp("prefix") / "t", add_dummy_prefix=True)


def fast_ids(folder: Path, samples: list[str], parses_special_tokens: bool) -> list[list[int]]:
    """Ids of the `tokenizers` library for the exported tokenizer.json."""
    import tokenizers

    reason = export.write(folder)
    assert reason is None
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.encode_special_tokens = not parses_special_tokens
    return [encoding.ids for encoding in fast.encode_batch(samples, add_special_tokens=False)]


@pytest.mark.parametrize("parses_special_tokens", [False, True])
@pytest.mark.parametrize("kind", ["folder", "prefix_folder"])
def test_ids_are_those_of_the_exported_tokenizer(kind, parses_special_tokens, request):
    folder = request.getfixturevalue(kind)
    samples = texts(400)
    ours = tokenizer.SentencePieceTokenizer(folder, parses_special_tokens)
    ids = [row.tolist() for row in ours.encode_batch(samples)]
    expected = fast_ids(folder, samples, parses_special_tokens)
    assert ids == expected
    as_json = tokenizer.JsonTokenizer(folder, parses_special_tokens)
    assert [row.tolist() for row in as_json.encode_batch(samples)] == expected
    assert {number for row in ids for number in row if number >= 900} >= {900, 902, 903, 904, 906, 908}
    assert any(ours.bos in row for row in ids) == parses_special_tokens


def test_ids_are_those_of_transformers_slow_tokenizer(folder):
    """transformers' tokenizer in Python over sentencepiece: the algorithm of InternLM's own class."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    class Slow(SentencePieceBackend):
        vocab_files_names: ClassVar = {"vocab_file": "tokenizer.model"}

    slow = Slow.from_pretrained(folder)
    ours = tokenizer.SentencePieceTokenizer(folder, parses_special_tokens=True)
    plain = [text for text in texts(400, seed=1) if "wurd" not in text and "\x1c" not in text]
    # A single word stands between spaces there, between characters that are no part of a word here.
    assert len(plain) > 100
    for text in plain:
        assert ours.encode(text).tolist() == slow.encode(text, add_special_tokens=False)


def test_control_without_the_splitter_ids_differ(folder):
    ours = tokenizer.SentencePieceTokenizer(folder)
    ours._splitter = AddedTokenSplitter({})
    assert 902 not in ours.encode("take aspirin now")


def test_text_behind_a_token_without_a_space_of_its_own(tmp_path):
    """`legacy` false: only the beginning of a text gets a space, as in transformers."""
    from transformers import LlamaTokenizer

    folder = write(tmp_path / "t", {"<think>": {}, "aspirin": {}}, {"legacy": False}, add_dummy_prefix=True)
    hugging_face = LlamaTokenizer.from_pretrained(folder)
    ours = tokenizer.load(folder)
    for text in ("take aspirin now", "a<think>b c", "<think> a<think>  b"):
        ids = ours.encode(text).tolist()
        assert ids == hugging_face.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
        decoder = IncrementalDecoder(ours)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == text


@pytest.mark.parametrize("kind", ["folder", "prefix_folder"])
def test_text_with_added_tokens_decodes_to_itself(kind, request):
    ours = tokenizer.SentencePieceTokenizer(request.getfixturevalue(kind))
    for text in ("take aspirin now", "<think>a</think> b", "a <think> b aspirins"):
        ids = ours.encode(text).tolist()
        assert ours.decode(ids) == text
        decoder = IncrementalDecoder(ours)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_a_renamed_piece(tmp_path):
    """An unused piece of the vocabulary that the JSON files give another name: text and ids both ways."""
    model = trained(user_defined_symbols=["[UNUSED_TOKEN_1]"])
    piece = 3
    decoder = {str(piece): {"content": "<think>", **FLAGS, "special": False}}
    ours = tokenizer.load(folder_with(tmp_path / "t", model, {"added_tokens_decoder": decoder}))
    assert ours._pieces[piece] == "[UNUSED_TOKEN_1]"
    assert piece in ours.encode("a<think>b")
    assert ours.decode(ours.encode("a<think>b")) == "a<think>b"


def test_tokens_declared_without_an_id_are_those_of_the_vocabulary(tmp_path):
    ours = tokenizer.load(folder_with(tmp_path / "t", trained(), {"bos_token": "<s>"}), True)
    assert ours.encode("a<s>b").tolist().count(ours.bos) == 1
    assert ours.bos not in tokenizer.load(tmp_path / "t").encode("a<s>b")


def test_the_longest_of_the_leftmost():
    names = {"ab": 1, "abc": 2, "bcd": 3}
    splitter = AddedTokenSplitter({name: AddedToken(number, False) for name, number in names.items()})
    assert splitter.split("xabcdab") == ["x", 2, "d", 1]
    assert splitter.split("") == []
    assert splitter.split("xyz") == ["xyz"]


def test_a_vocabulary_piece_that_is_not_utf_8(tmp_path):
    model = trained()
    at = model.index(b"self")
    folder = folder_with(tmp_path / "t", model[:at] + b"\xff\xfelf" + model[at + 4 :])
    with pytest.raises(tokenizer.UserError, match=r"tokenizer\.model is not a sentencepiece model"):
        tokenizer.load(folder)


def test_an_empty_file_is_no_model(tmp_path):
    folder = folder_with(tmp_path / "t", b"")
    with pytest.raises(tokenizer.UserError, match=r"tokenizer\.model is not a sentencepiece model"):
        tokenizer.load(folder)
    assert json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------- the choice to parse special tokens


def encoder(folder: Path, handler: str, parse: bool, **settings) -> DocumentEncoder:
    return DocumentEncoder(EncoderConfig(str(folder), handler, parse_special_tokens=parse, **settings))


def encode(documents: DocumentEncoder, row: dict) -> list[int]:
    columns = documents.handler.columns
    batch = RowBatch.with_locations([1], {name: [row.get(name)] for name in columns})
    return next(iter(documents.encode(batch).values())).documents[0].tokens.tolist()


def test_preprocessing_parses_special_tokens_when_asked(folder):
    text = "<s>a <|x|> b<think>"
    ids = {
        parse: encode(encoder(folder, "GeneralPretrainHandler", parse), {"text": text})
        for parse in (False, True)
    }
    assert ids[True] == tokenizer.SentencePieceTokenizer(folder, True).encode(text).tolist()
    assert {1, 909, 900} <= set(ids[True])
    assert {1, 909, 900} & set(ids[False]) == {900}  # not a special one: always
    streamed = hf_dataset._encoder_config(
        "x", DataConfig(tokenizer_name_or_path=str(folder), parse_special_tokens=True)
    )
    assert streamed.parse_special_tokens


def test_text_never_becomes_a_control_token_of_the_chat_format(tmp_path):
    """With special tokens parsed, <think> is one in a message, and <|im_end|>, <s> and </s> stay text."""
    names = {name: {"special": True} for name in (*CHAT, "<think>")}
    folder = write(tmp_path / "t", names)
    number = {name: id_ for id_, name in enumerate(names, 900)}
    answer = "<think>a</s> <|im_end|> <s>b"
    row = {"instruction": "<|im_start|>system", "output": answer}
    for parse in (False, True):
        ids = encode(encoder(folder, "AlpacaStyleInstructionHandler", parse, chat_template="v2.5"), row)
        assert ids.count(number["<|im_end|>"]) == 2  # the ends of the two turns
        assert ids.count(number["<|im_start|>"]) == 2
        assert (ids.count(1), ids.count(2)) == (1, 0)
        assert ids.count(number["<think>"]) == parse
        assert answer in tokenizer.load(folder).decode(ids).replace("\n", " ") or parse


def test_the_flag_of_the_command(folder, monkeypatch):
    calls = []
    command = runpy.run_path(str(TOOL))
    main = command["main"]
    monkeypatch.setitem(main.__globals__, "preprocess", lambda *arguments, **named: calls.append(arguments))
    flags = ["--input", "x.jsonl", "--tokenizer-name-or-path", str(folder), "--output-prefix", "p"]
    for more in ([], ["--parse-special-tokens"]):
        monkeypatch.setattr("sys.argv", ["preprocess_data.py", *flags, *more])
        main()
    assert [arguments[2].parse_special_tokens for arguments in calls] == [False, True]


# ---------------------------------------------------------------- ids beyond the model


def test_a_special_token_beyond_the_model_is_noted(tmp_path):
    """A <pad> one beyond the vocabulary: no text becomes it."""
    folder = write(tmp_path / "t", {"<pad>": {"special": True}}, {"pad_token": "<pad>"})
    loaded = tokenizer.load(folder)
    assert check_vocab_size(loaded, 901, "too large") == []  # control: the model has a row for it
    (note,) = check_vocab_size(loaded, 900, "too large")
    assert "adds '<pad>' = 900, beyond the 900 ids of the model" in note
    with pytest.raises(tokenizer.UserError, match="too large"):
        check_vocab_size(loaded, 899, "too large")


@pytest.mark.parametrize("case", ["ordinary", "parsed", "eos"])
def test_a_token_beyond_the_model_that_occurs_is_an_error(case, tmp_path):
    names = {"<pad>": {"special": case != "ordinary"}}
    folder = write(tmp_path / "t", names, {"eos_token": "<pad>"} if case == "eos" else {})
    loaded = tokenizer.load(folder, case == "parsed")
    with pytest.raises(
        tokenizer.UserError, match=r"adds '<pad>' = 900, .* \(0 to 899\): remove these tokens"
    ):
        check_vocab_size(loaded, 900, "too large")


@pytest.mark.parametrize("number", [5000, 2**31])
def test_a_vocabulary_with_gaps(number, folder, tmp_path):
    assert export.write(folder) is None
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["a"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    if number == 2**31:
        with pytest.raises(tokenizer.UserError, match="is not a token id"):
            tokenizer.load(tmp_path)
        return
    loaded = tokenizer.load(tmp_path)
    assert loaded.vocab_size == number + 1
    assert loaded.decode(loaded.encode("a b")) == "a b"
