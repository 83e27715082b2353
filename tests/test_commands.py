"""Command lines of the converters: mistakes are reported before anything is read or printed."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import corpus
from helpers.conversion import BASE, command, hugging_face
from helpers.internevo import BIASED, directory
from safetensors.torch import load_file

from ascendspeed.cli.source_checks import size_mismatches
from ascendspeed.models.families import PRESETS
from ascendspeed.utils.errors import UserError

TYPED = {
    "hf --tp 2": "--tp is for --format megatron or deepspeed or internevo, not for hf",
    "hf-llama --pp 2": "--pp is for --format megatron or internevo, not for hf-llama",
    "deepspeed --pp 2": "--pp is for --format megatron or internevo, not for deepspeed",
    "internevo --make-vocab-size-divisible-by 64": (
        "--make-vocab-size-divisible-by is for --format megatron or deepspeed"
    ),
    "megatron --max-shard-size 1GB": "--max-shard-size is for --format hf or hf-llama",
    "hf-llama --to-family internlm2": "--to-family is for --format hf, not for hf-llama",
    "hf --to-family internlm9": (
        "--to-family internlm9 does not exist; there are internlm, internlm2, internlm3"
    ),
    "megatron --copy-code": "--copy-code is for --format hf, not for megatron",
    "megatron --wp 2": "--wp is for --format internevo, not for megatron",
    "hf --internevo-version 1": "--internevo-version is for --format internevo, not for hf",
    "hf --embed-split": "--embed-split is for --format internevo, not for hf",
    "megatron --no-embed-split": "--embed-split is for --format internevo, not for megatron",
    "megatron --tp 0": "--tp 0 is too small: at least 1",
    "internevo --pp -1": "--pp -1 is too small: at least 1",
    "internevo --wp -1": "--wp -1 is too small: at least 0",
    "megatron --make-vocab-size-divisible-by 0": "--make-vocab-size-divisible-by 0 is too small",
    "hf --max-shard-size much": "'much' is not a size",
    "hf --scaling-factor 2": "--scaling-factor means nothing without --rotary-type dynamic",
}


@pytest.mark.parametrize("typed", TYPED)
def test_flags_are_checked_before_the_source_is_opened(typed, tmp_path, capsys):
    """--from does not exist."""
    with pytest.raises(UserError) as error:
        command("convert.py", *f"--from {tmp_path}/nowhere --to {tmp_path}/out --format {typed}".split())
    assert str(error.value).startswith(TYPED[typed])
    assert capsys.readouterr().out == ""


FULL = {
    "convert.py": "--from {source} --to {target} --format hf",
    "llama/convert_weights_from_huggingface.py": "--input-model-dir {source} --output-model-dir {target}",
    "llama/convert_weights_to_huggingface.py": "--input-model-dir {source} --output-model-dir {target}",
    "llama/convert_weights_when_tp_pp_change.py": "--input-model-dir {source} --output-model-dir {target}",
    "../transformers/convert2hf_internlm.py": "--src {source} --tgt {target}",
    "../transformers/convert2hf_internlm2.py": "--src {source} --tgt {target}",
    "../transformers/revert_internlm.py": "--src {source} --tgt {target} --version 2",
    "../transformers/revert_internlm2.py": "--src {source} --tgt {target}",
}


@pytest.mark.parametrize("name", FULL)
def test_a_target_that_is_not_empty_is_reported_first(name, tmp_path):
    (tmp_path / "thesis.txt").touch()
    words = FULL[name].format(source=tmp_path / "nowhere", target=tmp_path).split()
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        command(name, *words)
    words = FULL[name].format(source=tmp_path / "nowhere", target=tmp_path / "new").split()
    with pytest.raises(UserError, match="nowhere is not a directory"):  # control
        command(name, *words)


@pytest.mark.parametrize(
    "typed",
    [
        "--version 1",
        "--qk-interleaved yes",
        "--qkv-fused no",
        "--max-pos 8",
        "--rotary-type dynamic --scaling-factor 2",
    ],
)
def test_flags_of_internevo_folders(typed, tmp_path):
    hugging_face(tmp_path / "hf", replace(BASE, num_layers=1))
    directory(tmp_path / "evo-hf", "internlm", BIASED)
    command("convert.py", *f"--from {tmp_path}/evo-hf --to {tmp_path}/evo --format internevo --tp 1".split())
    with pytest.raises(UserError, match=r"is for an InternEvo training folder, which .*hf is not"):
        command("convert.py", *f"--from {tmp_path}/hf --to {tmp_path}/out --format hf {typed}".split())
    if "yes" in typed or "fused" in typed:
        return
    typed = typed.replace("--version 1", "--version 2")
    command(
        "convert.py", *f"--from {tmp_path}/evo --to {tmp_path}/out --format hf --pp 1 {typed}".split()
    )  # control


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama2-70b", "70B"),
        ("llama-7b", "7b"),
        ("llama2-7b", "7B"),
        ("internlm2.5-20b", "20B"),
        ("gemma-7b", "7B"),
    ],
)
def test_a_size_is_that_of_any_generation(name, size):
    assert not list(size_mismatches(PRESETS[name], size))
    (mismatch,) = size_mismatches(replace(PRESETS[name], num_layers=5), size)
    assert mismatch == f"--type {size}: num_layers {PRESETS[name].num_layers}, config.json 5"


def test_a_size_that_the_family_lacks():
    with pytest.raises(
        UserError, match=r"--type 8B: the family llama has no such size; there are llama-7b, llama-13b"
    ):
        list(size_mismatches(PRESETS["llama-7b"], "8B"))
    assert list(size_mismatches(PRESETS["llama2-70b"], "65B")) == [
        "--type 65B: ffn_hidden_size 22016, config.json 28672"
    ]


def test_an_error_names_the_tokenizer_as_it_was_typed(tmp_path):
    directory(tmp_path / "hf", "internlm", BIASED)
    command("convert.py", *f"--from {tmp_path}/hf --to {tmp_path}/evo --format internevo".split())
    large = corpus.sentencepiece_dir(tmp_path / "tokens", 400) / "tokenizer.model"
    too_large = large.rename(tmp_path / "v7.model")
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"pieces")
    for path, message in ((too_large, "has 400 pieces"), (junk, "is not a sentencepiece model")):
        with pytest.raises(UserError) as error:
            command(
                "../transformers/convert2hf_internlm.py",
                "--src",
                tmp_path / "evo",
                "--tgt",
                tmp_path / "x",
                "--tokenizer",
                path,
            )
        assert str(error.value).startswith(f"{path} {message}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ("", ["transformers has no class for internlm: trust_remote_code=True", "--format hf-llama"]),
        ("--format hf-llama --chat_template v1", ["Loads in stock transformers, vLLM"]),
    ],
)
def test_convert2hf_ends_with_what_loads_the_result(flags, lines, tmp_path, capsys):
    directory(tmp_path / "hf", "internlm", BIASED)
    command("convert.py", *f"--from {tmp_path}/hf --to {tmp_path}/evo --format internevo".split())
    words = corpus.sentencepiece_dir(tmp_path / "tokens", 100)
    capsys.readouterr()
    base = f"--src {tmp_path}/evo --tgt {tmp_path}/out --tokenizer {words}"
    command("../transformers/convert2hf_internlm.py", *base.split(), *flags.split())
    said = capsys.readouterr().out.splitlines()[-len(lines) :]
    assert all(expected in line for expected, line in zip(lines, said, strict=True))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == ("llama" if flags else "internlm")
    assert (tmp_path / "out" / "chat_template.jinja").exists() == bool(flags)


def test_a_random_model_with_noise(tmp_path):
    """With noise, a lost bias or norm changes the logits; without, biases are 0 and norms 1."""

    def random_weights(name: str, *flags: str) -> dict[str, torch.Tensor]:
        command("../random_model.py", "--output-dir", tmp_path / name, *flags)
        return load_file(tmp_path / name / "model.safetensors")

    standard = random_weights("a")
    noisy = random_weights("b", "--noise", "0.02")
    again = random_weights("c", "--noise=0.02")
    other_seed = random_weights("d", "--noise=0.02", "--seed=1")
    small = [name for name in standard if standard[name].ndim == 1]
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)
    assert all(torch.equal(standard[name], noisy[name]) == (name not in small) for name in standard)
    assert all(0 < (noisy[name] - standard[name]).std() < 0.04 for name in small)
    assert not any(torch.equal(noisy[name], other_seed[name]) for name in small)
    assert {float(standard[name].unique()) for name in small} == {0.0, 1.0}
    for wrong in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match=r"--noise .* is not a standard deviation"):
            command("../random_model.py", "--output-dir", tmp_path / "x", f"--noise={wrong}")
