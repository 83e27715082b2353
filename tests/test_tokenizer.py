"""Tokenizers: ids equal those of sentencepiece and of the tokenizers library; control tokens in text stay
text."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from helpers.corpus import REAL, TRAPS, json_dir, sentencepiece_dir, words

from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError

REAL_ONES = [name for name in ("internlm", "internlm2") if (REAL / name).is_dir()]


@pytest.fixture(params=["small", *REAL_ONES])
def folder(request, tmp_path):
    """A directory with tokenizer.model: a small one, and those of InternLM 1 and 2 if they are available."""
    return sentencepiece_dir(tmp_path / "small") if request.param == "small" else REAL / request.param


def test_ids_are_sentencepieces_own(folder):
    tok, reference = (
        tokenizer.load(folder),
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")),
    )
    texts = TRAPS + words(50)
    for text, ids in zip(texts, tok.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == reference.encode(text)
        assert tok.decode(ids) == text
    assert tok.vocab_size == reference.get_piece_size()
    assert tok.encode_batch([]) == []


def test_control_tokens_in_text_stay_text(folder):
    tok = tokenizer.load(folder)
    ids = tok.encode("<s>a</s>").tolist()
    assert not {tok.bos, tok.eos} & set(ids)
    assert tok.decode(ids) == "<s>a</s>"
    assert tok.decode([tok.bos, *ids, tok.eos]) == "<s>a</s>"
    assert (tok.bos, tok.eos, tok.pad) == (1, 2, 2)


@pytest.mark.skipif(
    "internlm2" not in REAL_ONES, reason="needs the real tokenizer; the lookup itself is tested below"
)
def test_ids_by_name_of_the_real_v2():
    assert tokenizer.load(REAL / "internlm2").required_id("[UNUSED_TOKEN_145]") == 92542


def test_a_token_is_found_by_its_string_added_ones_first(tmp_path):
    folder = sentencepiece_dir(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"7": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<|beyond|>": 9999}))
    tok = tokenizer.load(folder)
    assert tok.required_id("<|im_end|>") == 7
    assert tok.required_id("</s>") == 2
    assert tok.vocab_size == 10000
    with pytest.raises(UserError, match=r"no token '<\|nobody\|>'"):
        tok.required_id("<|nobody|>")
    with pytest.raises(UserError, match="id 10000"):
        tok.decode([3, 10000])


def test_tokenizer_json(tmp_path):
    folder = json_dir(tmp_path)
    tok, reference = tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()  # the file sets a truncation, which the project ignores
    for text, ids in zip(words(50), tok.encode_batch(words(50)), strict=True):
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids) == text
    text = "<s>a</s> ordinary_added"
    ids = tok.encode(text).tolist()
    assert not {tok.bos, tok.eos} & set(ids)
    assert tok.required_id("ordinary_added") in ids
    assert (
        tok.bos in reference.encode(text).ids
    )  # control: by default the library encodes the text as a control token
    assert tok.decode(ids) == text
    assert (tok.bos, tok.eos, tok.pad) == (1, 2, 2)


def test_tokenizer_model_has_priority(tmp_path):
    sentencepiece_dir(tmp_path)
    json_dir(tmp_path)
    assert isinstance(tokenizer.load(tmp_path), tokenizer.SentencePieceTokenizer)


def test_invalid_tokenizer_files(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        tokenizer.load(tmp_path / "absent")
    with pytest.raises(
        UserError, match=r"tokenizer\.model and tokenizer\.json, but the folder holds nothing"
    ):
        tokenizer.load(tmp_path)
    for name in tokenizer.TOKENIZER_CLASSES:
        (tmp_path / name).write_bytes(b"not a tokenizer")
        with pytest.raises(UserError, match=f"{name} is not"):
            tokenizer.load(tmp_path)
        (tmp_path / name).unlink()
    folder = sentencepiece_dir(tmp_path / "damaged")
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        tokenizer.load(tmp_path)
