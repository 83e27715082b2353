"""The exported tokenizer: stock transformers give sentencepiece's own ids."""

import inspect
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece

from ascendspeed.formats import tokenizer_json

FIXTURES = Path(__file__).parent.parent.parent / "shared" / "fixtures" / "tokenizers"
NASTY = (
    "Hello  world\n 123\n    \n\t你好|| |\n|a\n\n\n    b| leading|trailing |\t\t x|1234567890|naïve café|日本語テスト|😀 emoji 🇨🇳"
    "|a\u200bb|\u3000全角|def f(x):\n    return x  # c\n|\r\n win|e\u0301|\x00nul|▁under ▁x|Ｆｕｌｌ|<eoh> and <eoa>"
    "|<User>:hi\n<Bot>:|\n    \n|ﬁ|__':\n|!\")\n\nif"
)


def texts() -> list[str]:
    """Prose and code, cut anywhere, and noise."""
    dice, library = random.Random(0), "".join(inspect.getsource(m) for m in (inspect, json, random, shutil))
    cuts = [library[(a := dice.randrange(len(library))) : a + dice.choice((20, 80, 400))] for _ in range(800)]
    noise = ["".join(dice.choices("ab 1\n\t▁你 é😀.-_<>/\\\"'", k=dice.randint(1, 40))) for _ in range(400)]
    return [*NASTY.split("|"), "x" * 300, *cuts, *noise]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small model of InternLM's kind: byte fallback, no normalisation, no dummy prefix, user-defined pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<eoh>", "<eoa>", "Ｆ"],
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def exported(model: Path, folder: Path):
    """(sentencepiece, transformers) of the same tokenizer."""
    from transformers import AutoTokenizer

    shutil.copyfile(model, folder / "tokenizer.model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert tokenizer_json.write(folder) is None
    return sentencepiece.SentencePieceProcessor(str(model)), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check(model: Path, folder: Path) -> None:
    original, theirs = exported(model, folder)
    for text in texts():
        ids = original.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.encode(text) == [1, *ids]  # the model was trained with one <s> before every text
        assert theirs.decode(ids) == original.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (1, 2, 0, 2)
    assert len(theirs) == original.vocab_size()


def test_ids_are_those_of_sentencepiece(trained, tmp_path):
    check(trained, tmp_path)


@pytest.mark.parametrize("name", ["internlm", "internlm2"])
@pytest.mark.skipif(not FIXTURES.is_dir(), reason="beside the trained one above: the published tokenizers")
def test_published_tokenizers(name, tmp_path):
    check(FIXTURES / name / "tokenizer.model", tmp_path)


def test_control_merges_in_the_order_of_ids_are_seen(trained, tmp_path, monkeypatch):
    merges = tokenizer_json._merges
    monkeypatch.setattr(tokenizer_json, "_merges", lambda pieces: reversed(list(merges(pieces))))
    original, theirs = exported(trained, tmp_path)
    assert any(theirs.encode(text, add_special_tokens=False) != original.encode(text) for text in texts())


def test_other_kinds_are_left_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    assert "no sentencepiece model" in tokenizer_json.write(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=500,
        minloglevel=2,
    )
    assert "not plain BPE" in tokenizer_json.write(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
