"""The exported tokenizer in stock transformers: ids of sentencepiece and of the original tokenizer."""

import inspect
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from helpers.corpus import REAL
from helpers.tokenizers import chat_files, folder_with, special, stock, trained, unused
from sentencepiece import sentencepiece_model_pb2

from ascendspeed.conversion.tokenizer import export, sentencepiece_bpe
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError

FAMILIES = ("llama", "internlm", "internlm2", "internlm3", "baichuan", "gemma", "mixtral", "qwen2_moe")
OURS = ["<eoh>", "<eoa>", "Ｆ", "……", *(f"[UNUSED_TOKEN_{i}]" for i in range(141, 147))]
KINDS = {
    "internlm": {"user_defined_symbols": OURS},
    "gemma": {
        "user_defined_symbols": ["▁▁", "▁▁▁▁", "\n\n", "<start_of_turn>"],
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
    },
    "llama2": {"add_dummy_prefix": True},
    "no bytes": {"byte_fallback": False},
    "control": {"control_symbols": ["<|im_start|>", "<|im_end|>"]},
}


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    """By kind; the published ones too, where they are at hand."""
    models = {kind: trained(**settings) for kind, settings in KINDS.items()}
    return models | {
        f"published {n}": (REAL / n / "tokenizer.model").read_bytes()
        for n in ("internlm", "internlm2")
        if REAL.is_dir()
    }


def texts(count: int, pieces: list[str]) -> list[str]:
    """Code, noise of every script and of every kind of space, runs, pieces in any order, and what looks like
    special tokens.
    """
    dice, library = random.Random(7), "".join(inspect.getsource(m) for m in (inspect, json, random, shutil))
    scripts = (
        "ab1 \n\t▁你好日本語한국 éÅﬁ\u0301😀👨\u200d👩❤️\ufe0f🇨🇳العـ\u202eע"
        "\u0e44\u0e17हि<>/\\\"'{}.-_=*#\r\0\x01\x1b\x7f"
    )
    scripts += "\u00a0\u3000\ufeff\ud7ff\ue000\U0010ffff𠀀Ｆ…"
    named = [
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[UNUSED_TOKEN_145]",
        "<|im_start|>",
        "<|im_end|>",
        "<eoh>",
        "<0x41>",
        "<|User|>:",
        "  ",
        "\n\n",
    ]
    makers = (
        lambda: library[(a := dice.randrange(len(library))) : a + dice.choice((20, 80, 400))],
        lambda: "".join(dice.choices(scripts, k=dice.randint(1, 60))),
        lambda: "".join(c * dice.randint(1, 70) for c in dice.choices(scripts, k=4)),
        lambda: "".join(dice.choices(pieces, k=dice.randint(1, 20))).replace("▁", " "),
        lambda: "".join(
            chr(dice.choice((dice.randrange(0xD800), dice.randrange(0xE000, 0x110000)))) for _ in range(20)
        ),
        lambda: "".join(dice.choices([*named, *scripts], k=dice.randint(1, 12))),
    )
    return [
        "",
        " ",
        "x" * 3000,
        "你" * 1000,
        *(maker() for _ in range(count // len(makers)) for maker in makers),
    ]


def original(model, tokens: dict[str, int], text: str) -> list[int]:
    """Encodes like the published Python classes: declared strings first, sentencepiece between them."""
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    parts = re.split(f"({pattern})", text) if tokens else [text]
    return [i for part in parts for i in ([tokens[part]] if part in tokens else model.encode(part))]


def check(folder: Path, tokens: dict[str, int], count: int) -> None:
    """`tokens`: what the JSON files declare."""
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    assert export.write(folder) is None
    sample = texts(count, pieces)
    hf_tokenizer = stock(folder)
    bos = [] if hf_tokenizer.bos_token_id is None else [hf_tokenizer.bos_token_id]
    declared = [original(model, tokens, text) for text in sample]
    for text, ids, expected in zip(sample, hf_tokenizer(sample).input_ids, declared, strict=True):
        assert ids == [*bos, *expected], repr(text)
    plain = [model.encode(text) for text in sample]
    renamed = {number for name, number in tokens.items() if number < len(pieces) and pieces[number] != name}
    for text, ids in zip(sample, plain, strict=True):
        if not {model.unk_id(), *renamed} & set(
            ids
        ):  # sentencepiece writes what is unknown as a sign of its own
            assert hf_tokenizer.decode(ids) == model.decode(ids) == text.replace("▁", " "), repr(text)
    assert (
        declared != plain
    )  # the sample does hold declared strings: sentencepiece alone makes no control token of them
    if not renamed:
        for text, ids, expected in zip(
            sample, stock(folder, split_special_tokens=True)(sample).input_ids, plain, strict=True
        ):
            assert ids == [*bos, *expected], repr(text)


@pytest.mark.breadth
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece_and_of_the_original(models, kind, tmp_path):
    check(folder_with(tmp_path, models[kind]), special(models[kind]), 900)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="beside the trained ones above: the published tokenizers")
@pytest.mark.parametrize(("name", "count"), [("internlm", 60_000), ("internlm2", 60_000)])
def test_published_tokenizers(name, count, tmp_path):
    folder = Path(shutil.copytree(REAL / name, tmp_path / name, copy_function=shutil.copyfile))
    check(folder, {"<unk>": 0, "<s>": 1, "</s>": 2}, count)
    hf_tokenizer = stock(folder)
    assert hf_tokenizer("\n", add_special_tokens=False).input_ids == [364]
    assert (hf_tokenizer.pad_token, len(hf_tokenizer)) == ("</s>", 103168 if name == "internlm" else 92544)


@pytest.mark.parametrize("kind", ["internlm", pytest.param("published internlm2", marks=pytest.mark.slow)])
def test_chat_tokens_over_unused_pieces(models, kind, tmp_path):
    """`<|im_start|>` is the id of [UNUSED_TOKEN_146], by either string, as in the original; decoded it has
    its new name.
    """
    if kind not in models:
        pytest.skip("the published tokenizer of v2; a trained one is tested beside it")
    files = chat_files(models[kind])
    folder = folder_with(tmp_path, models[kind], **files)
    check(folder, special(models[kind]) | files["added_tokens"], 600)
    again = stock(folder)
    again.save_pretrained(tmp_path / "again")
    for hf_tokenizer in (again, stock(tmp_path / "again")):
        ids = files["added_tokens"]
        assert {name: hf_tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
        assert (
            hf_tokenizer("[UNUSED_TOKEN_146]<|im_start|>", add_special_tokens=False).input_ids
            == [ids["<|im_start|>"]] * 2
        )
        assert hf_tokenizer.decode([ids["<|im_start|>"]]) == "<|im_start|>"
        assert hf_tokenizer.decode([ids["<|im_end|>"]], skip_special_tokens=True) == ""
        message = [{"role": "user", "content": "hi  you"}]
        text = "<s><|im_start|>user\nhi  you<|im_end|>\n"
        assert hf_tokenizer.apply_chat_template(message, tokenize=False) == text
        model = tokenizer.load(folder)
        expected = [
            1,
            ids["<|im_start|>"],
            *model.encode("user\nhi  you"),
            ids["<|im_end|>"],
            *model.encode("\n"),
        ]
        assert hf_tokenizer.apply_chat_template(message, return_dict=False) == expected
    assert kind == "internlm" or (ids["<|im_start|>"], ids["<|im_end|>"]) == (92543, 92542)
    if kind != "internlm":
        assert len(stock(folder)) == 92544  # a name over a piece makes no new row


def test_added_tokens_beyond_the_vocabulary(models, tmp_path):
    """Also with the prefix of Llama 2: every stretch between such tokens is encoded as sentencepiece encodes
    it alone.
    """
    size = sentencepiece.SentencePieceProcessor(model_proto=models["llama2"]).vocab_size()
    added = {"<|im_start|>": size, "[PAD]": size + 3, "二 words": size + 1}
    folder = folder_with(
        tmp_path, models["llama2"], {"pad_token": "[PAD]", "add_eos_token": True}, added_tokens=added
    )
    assert export.write(folder) is None
    model, hf_tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")), stock(folder)
    text = "a b<|im_start|> user  x二 words[PAD]</s>y"
    expected = original(model, special(models["llama2"]) | added, text)
    assert hf_tokenizer(text).input_ids == [1, *expected, 2]
    assert hf_tokenizer.pad_token_id == size + 3
    assert {size, size + 1, size + 3} < set(expected)
    ours = tokenizer.load(folder)
    assert ours.decode([size + 1, *ours.encode("a b"), 2, size + 3]) == "二 wordsa b"
    assert (ours.base_vocab_size, ours.vocab_size) == (size, size + 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_model_is(models, family, tmp_path):
    """transformers choose the class of a tokenizer by the model's type too."""
    folder = folder_with(tmp_path, models["internlm"], {"tokenizer_class": "NobodysTokenizer"})
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    assert export.write(folder) is None
    text = "  two\n\n<eoh>\tx 12▁你"
    expected = tokenizer.load(folder).encode(text).tolist()
    assert stock(folder)(text).input_ids == [1, *expected]


def test_a_model_whose_type_forces_another_class(models, tmp_path):
    folder = folder_with(tmp_path, models["internlm"])
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert "no tokenizer but Qwen2Tokenizer" in export.write(folder)
    assert not (folder / "tokenizer.json").exists()


def changed(model: bytes, change) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    change(proto)
    return proto.SerializeToString()


def circle(proto) -> None:
    """aba + b and b + aba: which goes first depends on where they stand."""
    scores = {"xq": -1.0, "qx": -1.0, "x": -2.0, "q": -2.0}
    for piece, (text, score) in zip(
        [p for p in proto.pieces if p.type == sentencepiece_bpe.NORMAL], scores.items(), strict=False
    ):
        piece.piece, piece.score = text, score
    ordinary = [
        p
        for i, p in enumerate(proto.pieces)
        if p.type != sentencepiece_bpe.NORMAL or (p.piece in scores and i < 270)
    ]
    del proto.pieces[:]
    proto.pieces.extend(ordinary)


REFUSED = {
    "is no sentencepiece model": b"pieces",
    "is not BPE": lambda: trained(model_type="unigram", vocab_size=500),
    "normalises the text": lambda: trained(normalization_rule_name="nmt_nfkc"),
    "removes spaces": lambda: trained(remove_extra_whitespaces=True),
    "begins the text with a space and has user-defined pieces": lambda: trained(
        add_dummy_prefix=True, user_defined_symbols=["<eoh>"]
    ),
    "makes the unused piece 'self' and takes it apart again": lambda: changed(trained(), unused),
    "one score, so that their place in the text decides": lambda: changed(trained(), circle),
    "puts spaces behind words": lambda: trained(treat_whitespace_as_suffix=True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_said_is_not_written(reason, tmp_path):
    model = REFUSED[reason]
    folder = folder_with(tmp_path, model if isinstance(model, bytes) else model())
    assert reason in export.write(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.model"]


@pytest.mark.parametrize(
    ("reason", "config"),
    [
        ("legacy = false", {"legacy": False}),
        (
            "'<x>' is 300, which is also",
            {"added_tokens_decoder": {"300": {"content": "<x>", "special": True}}},
        ),
        (
            "'<y>' is 950, which is also '<x>'",
            {"added_tokens_decoder": {"950": {"content": "<x>"}, "0950": {"content": "<y>"}}},
        ),
    ],
)
def test_neighbours_that_contradict_the_model(models, reason, config, tmp_path):
    folder = folder_with(tmp_path, models["llama2"], config)
    assert reason in export.write(folder)
    assert not (folder / "tokenizer.json").exists()
    assert json.loads((folder / "tokenizer_config.json").read_text()) == config


def test_control_a_wrong_one_is_dropped(models, tmp_path, monkeypatch):
    """Merges in the order of ids, as in transformers: the comparison with sentencepiece finds them."""
    folder, ranked = folder_with(tmp_path, models["internlm"]), sentencepiece_bpe.merges
    monkeypatch.setattr(
        export, "merges", lambda pieces: sorted(ranked(pieces), key=lambda merge: -merge.piece)
    )
    assert "where tokenizer.json gives" in export.write(folder)
    assert not (folder / "tokenizer.json").exists()


def test_equal_scores_are_taken_from_the_left(models, tmp_path):
    """Two merges of one score that want the same symbol: sentencepiece takes the one on the left, whatever
    their ids.
    """

    def tie(proto) -> None:
        normal = [p for p in proto.pieces if p.type == sentencepiece_bpe.NORMAL]
        for piece, text in zip(normal, ("yz", "xy"), strict=False):  # the one on the left has the higher id
            piece.piece, piece.score = text, 1.0

    folder = folder_with(tmp_path, changed(trained(vocab_size=600), tie))
    assert export.write(folder) is None
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert model.encode("xyz", out_type=str)[0] == "xy"
    for text in ("xyz", "axyzb", "xyzxyz", "yzxy"):
        assert stock(folder)(text, add_special_tokens=False).input_ids == model.encode(text)


# --- one that came with the model


def pair(folder: Path, model: bytes, change=None) -> Path:
    """A directory with both, the second one changed."""
    folder_with(folder, model, **chat_files(model))
    assert export.write(folder) is None
    values = json.loads((folder / "tokenizer.json").read_text())
    if change:
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def cut_and_filled(values: dict) -> None:
    """Adds settings that training programs write and transformers ignore."""
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }


def test_a_tokenizer_json_that_is_its_model(models, tmp_path):
    export.check(pair(tmp_path / "whole", models["internlm"]))
    export.check(pair(tmp_path / "settings", models["internlm"], cut_and_filled))
    folder_with(tmp_path / "llama", models["llama2"])
    assert export.write(tmp_path / "llama") is None
    export.check(tmp_path / "llama")


def otherwise_merged(values: dict) -> None:
    values["model"]["merges"].reverse()


def two_exchanged(values: dict) -> None:
    vocab = values["model"]["vocab"]
    rare = sorted((name for name in vocab if name.isalpha() and len(name) > 6), key=vocab.get)[-2:]
    vocab.update(zip(rare, reversed([vocab[name] for name in rare]), strict=True))


def ends_exchanged(values: dict) -> None:
    for token in values["added_tokens"]:
        token["content"] = {"<s>": "</s>", "</s>": "<s>"}.get(token["content"], token["content"])
    vocab = values["model"]["vocab"]
    vocab["<s>"], vocab["</s>"] = vocab["</s>"], vocab["<s>"]


def chat_exchanged(values: dict) -> None:
    names = {"<|im_start|>": "<|im_end|>", "<|im_end|>": "<|im_start|>"}
    vocab = values["model"]["vocab"]
    for token in values["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab["<|im_start|>"], vocab["<|im_end|>"] = vocab["<|im_end|>"], vocab["<|im_start|>"]


def undeclared(values: dict) -> None:
    """A token that no other file speaks of."""
    more = {"id": values["model"]["vocab"]["self"], "content": "self", "special": False}
    values["added_tokens"].append(values["added_tokens"][0] | more)


def prefixed(values: dict) -> None:
    values["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "▁"})


def stripped(values: dict) -> None:
    values["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})


WRONG = {
    otherwise_merged: "where tokenizer.json gives",
    two_exchanged: "where tokenizer.json gives",
    ends_exchanged: "neighbours that say that '<s>' is 1, and tokenizer.json says 2",
    chat_exchanged: "neighbours that say that '<|im_",
    undeclared: "where tokenizer.json gives",
    prefixed: "where tokenizer.json gives",
    stripped: "tokenizer.json as",
}


@pytest.mark.breadth
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_tokenizer_json_that_is_not_its_model(models, change, tmp_path):
    with pytest.raises(UserError) as error:
        export.check(pair(tmp_path, models["internlm"], change))
    assert WRONG[change] in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.model'} ")
    assert len(str(error.value).splitlines()) == 1


def test_a_model_that_is_no_bpe_is_compared_too(models, tmp_path):
    pair(tmp_path, models["internlm"])
    (tmp_path / "tokenizer.model").write_bytes(trained(model_type="unigram", vocab_size=500))
    with pytest.raises(UserError, match=r"tokenizer\.model (gives|does not go with)"):
        export.check(tmp_path)
