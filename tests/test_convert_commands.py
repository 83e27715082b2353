"""The conversion commands that people type."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import corpus
from helpers.conversion import (
    BASE,
    ROOT,
    command,
    same,
    training_checkpoint,
    written,
)
from helpers.conversion_folders import MIXED, sources, split

from ascendspeed.conversion import convert
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError


def test_split_command_of_the_recipe(sources, tmp_path, capsys):
    folder, _ = sources("internlm", "finite")
    flags = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --bias --deepspeed"
    flags += " --make-vocab-size-divisible-by 16"
    more = "--num_layers 4 --num_heads 8 --num_kv_heads 8 --hidden_size 64 --merge-mlp --added-token-num 0"
    split(folder, tmp_path / "out", *flags.split(), *more.split())
    assert "--merge-mlp is accepted and ignored" in capsys.readouterr().out
    source = convert.open_reader(tmp_path / "out")
    assert source.description == "DeepSpeed rank files for TP 2 x PP 1"
    convert.compare(source, convert.open_reader(folder))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--type 7B", "num_layers 32, config.json 4"),
        ("--type 9B", "--type 9B: the family internlm has no such size; there are internlm-7b, internlm-20b"),
        ("--num_layers 5", "--num-layers 5, config.json 4"),
        ("--num_kv_heads 2", "--num-kv-heads 2, config.json 8"),
        ("--added-token-num 3", "resize_token_embeddings"),
        ("--pipeline-model-parallel-size 2 --deepspeed", "no pipeline stages"),
    ],
)
def test_split_command_checks_what_it_is_told(sources, tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        split(sources("internlm", "finite")[0], tmp_path / "out", *args.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format hf --tokenizer nowhere", "nowhere: no tokenizer here"),
        ("--format hf --chat-template v9", "--chat-template v9 does not exist"),
        ("--format megatron --tp 3", "do not split over 3 tensor-parallel ranks"),
        ("--format hf", "not reached"),  # control
    ],
)
def test_mistakes_are_found_before_the_weights_are_read(sources, tmp_path, monkeypatch, flags, message):
    def open_reader(*args):
        raise UserError("not reached")

    monkeypatch.setattr(convert, "open_reader", open_reader)
    folder, _ = sources("internlm", "finite")
    with pytest.raises(UserError, match=message):
        command("convert.py", "--from", folder, "--to", tmp_path / "out", *flags.split())


def test_bias_is_checked(sources, tmp_path):
    with pytest.raises(UserError, match=r"--bias True, config.json False"):
        split(sources("internlm without bias", "bf16")[0], tmp_path / "out", "--bias")


def test_convert_command(sources, tmp_path, capsys):
    folder, tensors = sources("llama, 2 groups", MIXED)
    corpus.sentencepiece_dir(tmp_path / "tokenizer", 100)
    command(
        "convert.py",
        "--from",
        folder,
        "--to",
        tmp_path / "w",
        "--format=megatron",
        "--tp=4",
        "--pp=2",
        "--verify",
        "--allow-nan",
    )
    command(
        "convert.py",
        *f"--from {tmp_path}/w --to {tmp_path}/hf --format hf --allow-nan".split(),
        *f"--tokenizer {tmp_path}/tokenizer".split(),
    )
    verdict = (
        r"verified, every byte of \d+ parameters; logits not compared: the weights hold NaN or infinity: "
    )
    assert re.search(f"{verdict}{tmp_path}/w\n", capsys.readouterr().out)
    assert same(written(tmp_path / "hf"), tensors)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (
        tmp_path / "tokenizer/tokenizer.model"
    ).read_bytes()
    with pytest.raises(
        UserError, match="--tp is for --format megatron or deepspeed or internevo, not for hf"
    ):
        command("convert.py", *f"--from {folder} --to {tmp_path}/x --format hf --tp 2".split())


def test_a_plain_llama_becomes_what_it_was(sources, tmp_path):
    folder, tensors = sources("internlm2", "finite")
    command("convert.py", *f"--from {folder} --to {tmp_path}/llama --format hf-llama".split())
    assert "model.layers.0.self_attn.q_proj.weight" in written(tmp_path / "llama")
    command(
        "convert.py",
        *f"--from {tmp_path}/llama --to {tmp_path}/back --format hf --to-family internlm2 --verify".split(),
    )
    assert same(written(tmp_path / "back"), tensors)
    for more, message in {
        "hf --to-family internlm9": "--to-family internlm9 does not exist; there are internlm, internlm2",
        "megatron --to-family internlm2": "--to-family is for --format hf, not for megatron",
    }.items():
        with pytest.raises(UserError, match=message):
            command("convert.py", *f"--from {folder} --to {tmp_path}/x --format {more}".split())


def test_a_tokenizer_that_is_not_found_is_said(sources, tmp_path, monkeypatch, capsys):
    """The run of a training checkpoint names its tokenizer as it was typed: relative to where the run was
    started.
    """
    corpus.sentencepiece_dir(tmp_path / "home/words", 100)
    (tmp_path / "elsewhere").mkdir()
    full = dict(convert.open_reader(sources("internlm", "finite")[0]).tensors())
    training_checkpoint(
        tmp_path / "ckpt", BASE, {name: tensor.float() for name, tensor in full.items()}, Path("words")
    )

    def export(cwd: str, name: str, *more: str) -> tuple[str, dict]:
        monkeypatch.chdir(tmp_path / cwd)
        capsys.readouterr()
        command(
            "convert.py", "--from", tmp_path / "ckpt", "--to", tmp_path / name, "--format", "hf-llama", *more
        )
        return capsys.readouterr().out, json.loads((tmp_path / name / "config.json").read_text())

    note = "note: no tokenizer was found at words; none is exported (give --tokenizer DIR)"
    message, config_json = export("elsewhere", "a")
    assert message.count(note) == 1
    assert "bos_token_id" not in config_json
    message, config_json = export("home", "b")
    assert "no tokenizer was found" not in message
    assert (config_json["bos_token_id"], config_json["eos_token_id"]) == (1, 2)
    assert (tmp_path / "b/tokenizer.model").exists()
    message, config_json = export(
        "elsewhere", "c", "--tokenizer", str(corpus.big_vocabulary_dir(tmp_path / "other", 100))
    )
    assert "no tokenizer was found" not in message
    assert (config_json["eos_token_id"], config_json["pad_token_id"], "bos_token_id" in config_json) == (
        1,
        1,
        False,
    )
    assert json.loads((tmp_path / "c/generation_config.json").read_text()) == {
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    with pytest.raises(UserError, match="nosuch: no tokenizer here"):
        export("home", "d", "--tokenizer", "nosuch")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("d")]


def test_token_ids_are_those_of_the_tokenizer(sources, tmp_path):
    """config.json says 2 for the end, the tokenizer 1; it has no beginning, so that of config.json stays."""
    folder, other = sources("internlm", "finite")[0], corpus.big_vocabulary_dir(tmp_path / "other", 100)
    command("convert.py", *f"--from {folder} --to {tmp_path}/hf --format hf --tokenizer {other}".split())
    config_json = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config_json["bos_token_id"], config_json["eos_token_id"], "pad_token_id" in config_json) == (
        1,
        1,
        False,
    )


def test_random_model_takes_its_token_ids_from_its_tokenizer(tmp_path, capsys):
    def ids(*flags: str) -> list[int | None]:
        command("../random_model.py", "--output-dir", tmp_path / "out", *flags)
        config_json = json.loads((tmp_path / "out/config.json").read_text())
        shutil.rmtree(tmp_path / "out")
        return [config_json.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]

    assert ids() == [1, 2, 2]
    assert "note: no tokenizer was found; none is exported (give --tokenizer DIR)" in capsys.readouterr().out
    assert ids("--tokenizer", str(corpus.big_vocabulary_dir(tmp_path / "words", 100))) == [None, 1, 1]
    with pytest.raises(UserError, match="nosuch: no tokenizer here"):
        ids("--tokenizer", "nosuch")
    assert not (tmp_path / "out").exists()


def test_random_model_of_any_size(tmp_path, capsys):
    """A tiny model for a tokenizer that is larger than its preset, as the real ones are."""

    def config(*flags: str) -> dict:
        command("../random_model.py", "--output-dir", tmp_path / "out", *flags)
        config_json = json.loads((tmp_path / "out/config.json").read_text())
        shutil.rmtree(tmp_path / "out")
        return config_json

    large = str(corpus.big_vocabulary_dir(tmp_path / "words", 3000))
    assert config("--tokenizer", large)["vocab_size"] == tokenizer.load(large).vocab_size > 2048
    small = str(corpus.big_vocabulary_dir(tmp_path / "few", 100))
    assert config("--tokenizer", small)["vocab_size"] == 2048
    sizes = "--vocab-size 4000 --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4"
    more = "--num-query-groups 2 --max-position-embeddings 64"
    made = config("--model", "internlm2-tiny", "--tokenizer", large, *sizes.split(), *more.split())
    names = "vocab_size num_hidden_layers hidden_size intermediate_size num_attention_heads"
    expected = [4000, 2, 64, 96, 4]
    assert [made[name] for name in names.split()] == expected
    assert (made["num_key_value_heads"], made["max_position_embeddings"]) == (2, 64)
    for flags, message in (
        ("--hidden-size 30", "hidden size 30 does not split over 8 attention heads"),
        ("--num-layers 0", "--num-layers 0: at least 1"),
        (f"--vocab-size 2048 --tokenizer {large}", "pieces, but the vocabulary of the model 2048"),
    ):
        with pytest.raises(UserError, match=message):
            config(*flags.split())
        assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    script = ROOT / "tools/ckpt_convert/convert.py"
    args = ["--from", str(tmp_path), "--to", str(tmp_path / "x"), "--format", "hf"]
    result = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
