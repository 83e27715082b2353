"""Checks of a training command before any process is started: missing inputs, and notes at the start."""

import pytest

from ascendspeed.cli.train_args import check_inputs, resolve
from ascendspeed.utils.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a tokenizer, data as a pair, as rows and in a folder, and weights."""
    monkeypatch.chdir(tmp_path)
    for name in ("tok/tokenizer.json", "text_document.idx", "rows/a.jsonl", "weights/x", "ds.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def check(words: str) -> None:
    check_inputs(resolve(["--model", "internlm-tiny", *words.split()], None)[0])


@pytest.mark.parametrize(
    "words",
    [
        "--data-path text_document --tokenizer-name-or-path tok --load weights",
        "--data-path text",  # the beginning of names, as of a masked pair
        "--data-path rows",
        "--data-path rows/*.jsonl",
        "--data-path rows/a.jsonl",
        "--data-path 0.3 text 0.7 rows --valid-data-path rows --eval-interval 1 --split 1,0,0",
        "--data-path text --load new --save ./new",  # the first start of a run
        "--data-path text --deepspeed --deepspeed_config ds.json",
    ],
)
def test_what_is_there_passes(folder, words):
    check(words)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("--data-path text --tokenizer-name-or-path tok/tokenizer.json", "--tokenizer-name-or-path tok/tok"),
        ("--data-path text --tokenizer-name-or-path rows", "--tokenizer-name-or-path rows (a folder with"),
        (
            "--data-path other",
            "--data-path other (no file has this prefix; prefixes in its folder: text_document)",
        ),
        (
            "--data-path no/other",
            "--data-path no/other (no file has this prefix; prefixes in its folder: none)",
        ),
        ("--data-path rows/*.csv", "--data-path rows/*.csv (no file"),
        ("--data-path 0.3 text 0.7 other", "--data-path other"),
        ("--data-path text --valid-data-path no --eval-interval 1", "--valid-data-path no (no file"),
        ("--data-path text --load no --save new", "--load no (no such folder)"),
        ("--data-path text --load ds.json", "--load ds.json (no such folder)"),
        ("--data-path text --deepspeed --deepspeed_config no.json", "--deepspeed_config no.json (no such"),
    ],
)
def test_what_is_missing_is_named(folder, words, missing):
    with pytest.raises(UserError) as error:
        check(words)
    assert str(error.value).startswith(f"missing: {missing}")
    assert "\n" not in str(error.value)


def test_all_of_it_is_named_at_once(folder):
    with pytest.raises(UserError) as error:
        check("--data-path a --tokenizer-name-or-path b --load c --deepspeed --deepspeed_config d")
    for words in ("--data-path a", "--tokenizer-name-or-path b", "--load c", "--deepspeed_config d"):
        assert words in str(error.value)


def test_an_unknown_number_of_processes_is_not_judged():
    words = ["--model", "internlm-tiny", "--data-path", "x", "--tensor-model-parallel-size", "2"]
    resolve(words, None)
    with pytest.raises(UserError, match=r"start a multiple of 2 \(NPROC=2\)"):  # control
        resolve(words, 1)
    with pytest.raises(UserError, match="--lr"):  # what does not depend on it still is
        resolve([*words, "--lr", "-1"], None)


def test_a_mixture_of_experts_without_a_balancing_loss_is_noted():
    texts = {
        name: resolve(["--data-path", "x", "--model", name], 1)[1] for name in ("mixtral-tiny", "llama-tiny")
    }
    assert sum("experts are trained without a balancing loss" in note for note in texts["mixtral-tiny"]) == 1
    assert not any("balancing" in note for note in texts["llama-tiny"])
