"""Token ids of config.json and generation_config.json against the tokenizer, and folders with several sets of
weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.hf_folders import directory, export, stored
from helpers.log_lines import log_lines
from helpers.tokenizers import chat_files, stock, trained
from safetensors.torch import load_file, save_file

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.huggingface.reading import read_tensors
from ascendspeed.tokenization.chat import generation_config_stops
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """A chat model of v2: BOS 1, EOS and PAD 2, UNK 0, and <|im_end|>."""
    model = trained(user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)])
    files = chat_files(model)
    config = files.pop("config") | {"pad_token": "</s>"}
    return directory(tmp_path_factory.mktemp("chat") / "m", model, tokenizer_config=config, **files)


@pytest.fixture
def folder(chat, tmp_path) -> Path:
    return Path(shutil.copytree(chat, tmp_path / "source"))


def set_ids(folder: Path, file: str = "config", **ids) -> None:
    path = folder / f"{file}.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {f"{name}_token_id": value for name, value in ids.items()}))


def written_ids(folder: Path, file: str) -> list:
    return [stored(folder, file).get(f"{name}_token_id") for name in ("bos", "eos", "pad")]


def turn_end(folder: Path) -> int:
    return json.loads((folder / "added_tokens.json").read_text())["<|im_end|>"]


@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_ids_that_contradict_the_tokenizer_are_corrected_and_named(file, folder, tmp_path, caplog):
    set_ids(folder, file, bos=0, eos=1, pad=0)
    out = export(folder, tmp_path / "out")
    assert written_ids(out, file) == [1, 2, 2]
    assert written_ids(out, "generation_config")[:2] == [1, 2]  # made of config.json, or corrected itself
    notes = caplog.text
    for name, wrong, right in (("bos", 0, 1), ("eos", 1, 2), ("pad", 0, 2)):
        assert f"{name}_token_id = {wrong}, but the tokenizer in {folder} has {right}" in notes
    tokenizer = stock(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize("case", ["agreeing", "several ends", "none stated", "no pad named"])
def test_control_ids_that_agree_are_written_as_they_are(case, folder, tmp_path, caplog):
    end = turn_end(folder)
    ids = {
        "agreeing": {"bos": 1, "eos": 2, "pad": 2},
        "several ends": {"bos": 1, "eos": [2, end], "pad": 2},
        "none stated": {"bos": None, "eos": 2, "pad": None},
        "no pad named": {"bos": 1, "eos": 2, "pad": 0},
    }[case]
    if case == "no pad named":
        config = stored(folder, "tokenizer_config")
        del config["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    set_ids(folder, **ids)
    out = export(folder, tmp_path / "out")
    assert written_ids(out, "config") == list(ids.values())
    assert "token_id" not in caplog.text


def test_the_end_of_a_turn_stays_a_stop_token(folder, tmp_path):
    end = turn_end(folder)
    set_ids(folder, eos=end)
    set_ids(folder, "generation_config", eos=[end, 1])
    out = export(folder, tmp_path / "out")
    assert stored(out, "config")["eos_token_id"] == [2, end]
    assert stored(out, "generation_config")["eos_token_id"] == [2, end]


@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_a_pad_token_of_minus_one_is_none(file, folder, tmp_path, caplog):
    (folder / "tokenizer_config.json").write_text(
        json.dumps(stored(folder, "tokenizer_config") | {"pad_token": None})
    )
    set_ids(folder, file, bos=1, eos=2, pad=-1)
    out = export(folder, tmp_path / "out")
    assert "pad_token_id" not in stored(out, file)
    assert written_ids(out, "generation_config") == [1, 2, None]
    assert f"{folder}" in caplog.text
    assert "pad_token_id = -1 means that there is none" in caplog.text


@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_minus_one_gives_way_to_an_id_of_the_tokenizer(file, folder, tmp_path, caplog):
    """Without an end, transformers would run on after </s>."""
    set_ids(folder, file, bos=-1, eos=-1, pad=-1)
    out = export(folder, tmp_path / "out")
    assert written_ids(out, file) == [1, 2, 2] == written_ids(out, "generation_config")
    assert f"eos_token_id = -1, but the tokenizer in {folder} has 2: 2 is written" in caplog.text


def test_no_end_among_the_stop_tokens(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": -1}')
    assert generation_config_stops(tmp_path) == ()


def test_ids_beyond_the_model_are_not_written(tmp_path):
    """A <pad> one beyond the vocabulary: the model has no row for it."""
    model = trained(vocab_size=1000)
    folder = directory(tmp_path / "source", model, added_tokens={"<pad>": 1000})
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    set_ids(folder, bos=None, eos=None)
    out = export(folder, tmp_path / "out")
    assert written_ids(out, "config") == [1, 2, None]


# ---------------------------------------------------------------- several sets of weights


@pytest.fixture
def weights(tmp_path) -> Path:
    return directory(tmp_path / "source", None)


def add_bin(folder: Path, name: str = "pytorch_model.bin") -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / name)


def add_shards(folder: Path, first: int = 1) -> None:
    tensors = list(load_file(folder / "model.safetensors").items())
    for number, part in enumerate((tensors[:2], tensors[2:]), first):
        save_file(dict(part), folder / f"model-{number:05d}-of-00002.safetensors")


def add_index(folder: Path, files: dict[str, str] | None = None) -> None:
    tensors = list(load_file(folder / "model.safetensors"))
    names = ["model-00001-of-00002.safetensors"] * 2 + ["model-00002-of-00002.safetensors"] * len(tensors)
    weight_map = files or dict(zip(tensors, names, strict=False))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("both kinds", ["model.safetensors", "pytorch_model.bin"]),
        ("shards without an index", ["model.safetensors", "model-00001-of-00002.safetensors", "no index"]),
        ("single and shards", ["model.safetensors", "model.safetensors.index.json"]),
        ("stale shards", ["model.safetensors.index.json", "model-00007-of-00002.safetensors", "no index"]),
    ],
)
def test_several_sets_of_weights_are_an_error(case, named, weights):
    assert read_tensors(weights)  # control: one set
    if case == "both kinds":
        add_bin(weights)
    else:
        add_shards(weights)
    if case in ("single and shards", "stale shards"):
        add_index(weights)
    if case == "stale shards":
        add_shards(weights, 7)
        (weights / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        convert.open_reader(weights)
    assert str(error.value).startswith(f"{weights} has several sets of weights: ")
    assert "remove the others" in str(error.value)
    for name in named:
        assert name in str(error.value)


def test_weights_of_other_programs_are_named(weights):
    with log_lines() as lines:
        assert read_tensors(weights)
        assert lines == []  # control
        names = ["adapter_model.safetensors", "consolidated.00.pth", "tf_model.h5"]
        for name in names:
            (weights / name).touch()
        assert read_tensors(weights)
    assert lines == [f"note: {weights}: {', '.join(names)} may hold weights too, which are not read"]


def test_an_index_without_its_shards_is_no_set(weights):
    """Left by a download of one kind of files only."""
    (weights / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}})
    )
    assert read_tensors(weights)


def test_an_index_of_the_single_file(weights):
    add_index(weights, dict.fromkeys(load_file(weights / "model.safetensors"), "model.safetensors"))
    assert read_tensors(weights).keys() == load_file(weights / "model.safetensors").keys()


def test_only_an_index_names_the_missing_shard(weights):
    add_index(weights)
    (weights / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00001-of-00002\.safetensors"):
        convert.open_reader(weights)
