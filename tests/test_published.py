"""InternLM's own four commands for InternEvo's folders, and the general one: flags, defaults, and what they
write.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import corpus
from helpers.conversion import command, same
from helpers.evo_oracle import Trained, model_config, save_config
from helpers.internevo import BIASED, GROUPED, PLAIN, config_of, directory, equal
from safetensors.torch import load_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError


def run(name: str, *args) -> None:
    command(f"../transformers/{name}.py", *args)


def config_at(folder: Path) -> ModelConfig:
    config_json = json.loads((folder / "config.json").read_text())
    return FAMILIES[config_json["model_type"]].read_config(config_json)


def test_the_published_commands_of_internlm(tmp_path, capsys):
    """revert_internlm.py -> convert2hf_internlm.py, with their defaults; config.json goes before those, what
    is typed before it.
    """
    shape = replace(BIASED, vocab=512)
    tensors = directory(tmp_path / "hf", "internlm", shape)
    tokens = corpus.sentencepiece_dir(tmp_path / "tokens") / "tokenizer.model"
    tokens.rename(tmp_path / "v7.model")
    flags = "--tp_size 2 --embed_split --use_flash --version 1 --safetensors"
    run("revert_internlm", "--src", tmp_path / "hf", "--tgt", tmp_path / "evo", *flags.split())
    assert (
        "to be trained as INTERNLM with embed_split_hidden=True, qk_interleaved=False"
        in capsys.readouterr().out
    )
    assert equal(tmp_path / "evo", shape, Trained("INTERNLM", 2, version=1))
    with pytest.raises(UserError, match="--tokenizer is needed"):
        run("convert2hf_internlm", "--src", tmp_path / "evo", "--tgt", tmp_path / "a")
    where = ("--src", tmp_path / "evo", "--tokenizer", tmp_path / "v7.model", "--tgt")
    run("convert2hf_internlm", *where, tmp_path / "a")
    assert same(load_file(tmp_path / "a/model.safetensors"), tensors)
    assert config_at(tmp_path / "a") == config_of("internlm", shape)
    assert (tmp_path / "a/tokenizer.model").is_file()
    (tmp_path / "evo/config.json").unlink()
    run(
        "convert2hf_internlm",
        *where,
        tmp_path / "b",
        "--max_pos",
        "16",
        "--rotary_type",
        "dynamic",
        "--dtype",
        "float32",
    )
    assert config_at(tmp_path / "b") == replace(
        config_of("internlm", shape),
        max_position_embeddings=16,
        rope_scaling_type="dynamic",
        rope_scaling_factor=1.0,
    )
    assert load_file(tmp_path / "b/model.safetensors")["lm_head.weight"].dtype == torch.float32
    (tmp_path / "evo/model_config.pt").unlink()
    save_config(tmp_path / "evo/model_config.pt", model_config(shape, Trained("INTERNLM")))
    capsys.readouterr()
    run("convert2hf_internlm", *where, tmp_path / "c", "--scaling_factor", "2")
    assert config_at(tmp_path / "c").max_position_embeddings == 4096
    assert "--scaling_factor 2.0 changes nothing without --rotary_type dynamic" in capsys.readouterr().out
    with pytest.raises(UserError, match="no internlm2 model"):
        run("convert2hf_internlm2", *where, tmp_path / "d")


def test_the_published_commands_of_internlm2(tmp_path):
    shape = replace(GROUPED, vocab=512)
    tensors = directory(tmp_path / "hf", "internlm2", shape)
    corpus.sentencepiece_dir(tmp_path / "tokens")
    run(
        "revert_internlm2",
        "--src",
        tmp_path / "hf",
        "--tgt",
        tmp_path / "evo",
        "--tp_size",
        4,
        "--embed_split",
        "--use_flash",
    )
    assert equal(tmp_path / "evo", shape, Trained("INTERNLM2", 4))
    (tmp_path / "evo/config.json").unlink()
    where = ("--src", tmp_path / "evo", "--tokenizer", tmp_path / "tokens", "--tgt")
    run("convert2hf_internlm2", *where, tmp_path / "a", "--max_pos", 64, "--rotary_type", "dynamic")
    assert same(load_file(tmp_path / "a/model.safetensors"), tensors)
    assert config_at(tmp_path / "a").rope_scaling_factor == 2.0
    assert config_at(tmp_path / "a").max_position_embeddings == 64
    with pytest.raises(UserError, match=r"use revert_internlm2\.py"):
        run("revert_internlm", "--src", tmp_path / "hf", "--tgt", tmp_path / "b", "--version", 2)


@pytest.mark.parametrize("adapt_hf", [False, True])
def test_revert_pairs_the_rows_of_a_model_without_biases(tmp_path, adapt_hf):
    """Like the original without --adapt_hf, which split the 20B's 40 heads at TP 4 wrongly."""
    shape = replace(PLAIN, hidden=80, heads=40, kv=40, vocab=80)
    tensors = directory(tmp_path / "hf", "internlm", shape)
    more = ["--adapt_hf"] if adapt_hf else []
    run(
        "revert_internlm",
        "--src",
        tmp_path / "hf",
        "--tgt",
        tmp_path / "evo",
        "--tp_size",
        4,
        "--version",
        2,
        "--embed_split",
        *more,
    )
    assert equal(tmp_path / "evo", shape, Trained("LLAMA2", 4, interleaved=not adapt_hf))
    convert.write_hf(convert.open_reader(tmp_path / "evo"), tmp_path / "back")
    assert same(load_file(tmp_path / "back/model.safetensors"), tensors)


def test_convert_command(tmp_path, capsys):
    tensors = directory(tmp_path / "hf", "internlm", BIASED)
    flags = "--format internevo --wp 4 --pp 2 --internevo-version 1 --no-embed-split --verify"
    command("convert.py", "--from", tmp_path / "hf", "--to", tmp_path / "evo", *flags.split())
    assert equal(
        tmp_path / "evo",
        BIASED,
        Trained("INTERNLM", 1, (2, 2), 4, version=1, embed_split=False, flash_embedding=True),
    )
    command("convert.py", "--from", tmp_path / "evo", "--to", tmp_path / "back", "--format", "hf")
    assert "InternEvo training folder for WP 4 x PP 2, names of INTERNLM" in capsys.readouterr().out
    assert same(load_file(tmp_path / "back/model.safetensors"), tensors)
    with pytest.raises(UserError, match="--wp is for --format internevo"):
        command(
            "convert.py",
            "--from",
            tmp_path / "hf",
            "--to",
            tmp_path / "no",
            "--format",
            "megatron",
            "--wp",
            2,
        )
