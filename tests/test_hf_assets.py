"""Files beside the weights: kept, dropped, or refused before anything is written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import corpus
from helpers.hf_folders import AUTO_MAP, CODE, MODEL, TOKENIZER_MAP, directory, export, stored
from helpers.tokenizers import chat_files, stock, trained

from ascendspeed.conversion import convert
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """A chat model of v2 as it is published."""
    model = trained(user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)])
    files = chat_files(model)
    files["config"] |= {"auto_map": TOKENIZER_MAP}
    generation = {
        "bos_token_id": 1,
        "eos_token_id": [2, files["added_tokens"]["<|im_end|>"]],
        "pad_token_id": 2,
        "max_length": 99,
    }
    beside = {"tokenizer_config": files["config"], "generation_config": generation}
    folder = directory(tmp_path_factory.mktemp("published") / "chat", model, **beside)
    (folder / "chat_template.jinja").write_text("{{ 'jinja' }}")
    return folder


@pytest.mark.parametrize("family", [None, "llama"])
def test_a_published_chat_model(chat, family, tmp_path):
    out = export(chat, tmp_path / "out", family=family)
    assert stored(out, "generation_config") == stored(chat, "generation_config")  # both ends of a turn
    assert (out / "chat_template.jinja").read_bytes() == (chat / "chat_template.jinja").read_bytes()
    assert (out / "tokenizer.model").read_bytes() == (chat / "tokenizer.model").read_bytes()
    tokenizer_config = stored(out, "tokenizer_config")
    assert tokenizer_config["chat_template"] == stored(chat, "tokenizer_config")["chat_template"]
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not [name for name in out.glob("*.json") if "auto_map" in name.read_text()]
    assert not list(out.glob("*.py"))
    ends = stored(chat, "generation_config")["eos_token_id"]
    assert stock(out)("</s><|im_end|>", add_special_tokens=False).input_ids == ends


def test_code_is_copied_unexecuted_when_asked_for(chat, tmp_path):
    out = export(chat, tmp_path / "out", copy_code=True)
    assert (out / "modeling_internlm2.py").read_text() == CODE
    assert stored(out, "config")["auto_map"] == AUTO_MAP
    assert stored(out, "tokenizer_config")["auto_map"] == TOKENIZER_MAP
    assert stock(out)("a").input_ids[0] == 1  # without trust_remote_code the code stays where it is
    assert "modeling_internlm2" not in sys.modules
    with pytest.raises(UserError, match="not that of a model of family llama: leave --copy-code out"):
        export(chat, tmp_path / "llama", family="llama", copy_code=True)
    (tmp_path / "bare").mkdir()
    source = replace(convert.open_reader(chat), assets_dir=tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare has no \*\.py"):
        convert.convert(source, tmp_path / "x", convert.HuggingFaceWriter(copy_code=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "out"]


def test_a_tokenizer_json_of_the_source_is_copied(tmp_path):
    """Its class too where stock transformers have it; a class of the repository's own becomes the general
    one.
    """
    source = corpus.json_dir(directory(tmp_path / "source", None))
    for given, written in {
        "Qwen2TokenizerFast": "Qwen2TokenizerFast",
        "QWenTokenizer": "PreTrainedTokenizerFast",
    }.items():
        (source / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": given, "bos_token": "<s>"})
        )
        out = export(source, tmp_path / given)
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        assert stored(out, "tokenizer_config") == {"tokenizer_class": written, "bos_token": "<s>"}


def test_rank_files_and_back(chat, tmp_path):
    """The tokenizer goes with rank files and comes back; the tokenizer.json is made where transformers look
    for it.
    """
    convert.convert(convert.open_reader(chat), tmp_path / "ranks", convert.RankFileWriter(2))
    assert (tmp_path / "ranks/tokenizer.model").exists()
    assert "auto_map" not in stored(tmp_path / "ranks", "tokenizer_config")
    out = export(tmp_path / "ranks", tmp_path / "out")
    assert stored(out, "generation_config") == stored(chat, "generation_config")
    assert (out / "tokenizer.json").read_bytes() == (
        export(chat, tmp_path / "straight") / "tokenizer.json"
    ).read_bytes()


def test_what_cannot_be_expressed_is_said(tmp_path, capsys):
    out = export(
        directory(tmp_path / "source", trained(model_type="unigram", vocab_size=500)), tmp_path / "out"
    )
    assert (
        "note: no tokenizer.json: tokenizer.model is not BPE; stock transformers may not load"
        in capsys.readouterr().out
    )
    assert (out / "tokenizer.model").exists()
    assert not (out / "tokenizer.json").exists()


def broken(folder: Path, **files: str | bytes) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer__model": b"pieces"}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer__json": "{}"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json cannot be read, it is not JSON"),
        ({"tokenizer_config__json": '{"bos_token": 7}'}, "7 is not a token"),
        (
            {"tokenizer_config__json": '{"added_tokens_decoder": [1]}'},
            "do not have the structure that transformers writes",
        ),
        (
            {"tokenizer_config__json": '{"additional_special_tokens": 3}'},
            "do not have the structure that transformers writes",
        ),
        ({"added_tokens__json": '{"<x>": "many"}'}, "'many' is not a token id"),
        ({"special_tokens_map__json": '{"eos_token": "<nobody>"}'}, "no token '<nobody>'"),
        ({"generation_config__json": "[]"}, "generation_config.json is not a table"),
        ({"generation_config__json": b"\xff"}, "generation_config.json cannot be read, it is not JSON"),
        (
            {"generation_config__json": '{"a": "\\ud800"}'},
            "generation_config.json cannot be read, it is not JSON",
        ),
    ],
)
def test_damage_is_an_error_before_anything_is_written(chat, files, message, tmp_path):
    folder = directory(tmp_path / "source", (chat / "tokenizer.model").read_bytes())
    with pytest.raises(UserError) as error:
        export(broken(folder, **files), tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_of_a_larger_vocabulary_is_an_error(chat, tmp_path):
    small = directory(
        tmp_path / "small", (chat / "tokenizer.model").read_bytes(), replace(MODEL, vocab_size=899)
    )
    with pytest.raises(
        UserError, match=r"tokenizer\.model has 900 pieces, but the vocabulary of the model 899"
    ):
        convert.convert(convert.open_reader(small), tmp_path / "out", convert.RankFileWriter(1))
    assert not (tmp_path / "out").exists()
    export(
        small, tmp_path / "out", tokenizer=corpus.sentencepiece_dir(tmp_path / "fits", 100)
    )  # fewer is no fault
    export(
        directory(tmp_path / "same", (chat / "tokenizer.model").read_bytes(), replace(MODEL, vocab_size=900)),
        tmp_path / "even",
    )


def test_two_tokenizers_that_differ_are_an_error(chat, tmp_path):
    """Whatever is written: the one that is not meant would be found by somebody."""
    out = export(chat, tmp_path / "out")
    source = Path(shutil.copytree(out, tmp_path / "source"))
    export(source, tmp_path / "again")  # control: the pair that was written here
    values = stored(source, "tokenizer")
    values["model"]["merges"].reverse()
    (source / "tokenizer.json").write_text(json.dumps(values))
    for to in (convert.HuggingFaceWriter(), convert.RankFileWriter(2)):
        with pytest.raises(
            UserError, match=r"tokenizer\.model gives .* where tokenizer\.json gives .*: move the one away"
        ):
            convert.convert(convert.open_reader(source), tmp_path / "no", to)
    assert not (tmp_path / "no").exists()
    export(source, tmp_path / "fits", tokenizer=chat)


IDS = {
    "no number": ("eos_token_id", "2"),
    "a switch": ("bos_token_id", True),
    "a fraction": ("bos_token_id", 1.0),
    "negative": ("pad_token_id", -2),
    "beyond the vocabulary": ("eos_token_id", 1000),
    "one of a list": ("eos_token_id", [2, 1000]),
    "a list of lists": ("eos_token_id", [[2]]),
}


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_token_ids_that_the_model_does_not_have(case, file, tmp_path):
    name, value = IDS[case]
    folder = directory(
        tmp_path / "source", None, generation_config={"eos_token_id": [2, 999], "pad_token_id": None}
    )
    export(folder, tmp_path / "fine")  # control: the last row, several ends, null
    (folder / f"{file}.json").write_text(json.dumps(stored(folder, file) | {name: value}))
    with pytest.raises(UserError) as error:
        export(folder, tmp_path / "out")
    assert f": {name} = {value!r} is no token of a vocabulary of 1000 (ids 0 to 999)" in str(error.value)
    assert f"{file}.json" in str(error.value)
    assert str(error.value).startswith(str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "generation_config.json", "modeling_internlm2.py"])
def test_links_out_of_the_directory_are_not_followed(chat, name, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((chat / name).read_bytes())
    folder = directory(tmp_path / "source", None)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match="is a link that leads out of"):
        convert.convert(
            convert.open_reader(folder), tmp_path / "out", convert.HuggingFaceWriter(copy_code=True)
        )
    assert not (tmp_path / "out").exists()
