"""Edges of every command: paths that cannot be used, numbers out of range, help."""

import importlib.util
import os
import random
import re
import sys
from pathlib import Path

import pytest
from helpers import checkpoints
from helpers.fuzz import Findings

from ascendspeed.checkpoint.discovery import open_checkpoint
from ascendspeed.cli import parser
from ascendspeed.cli.train_args import TrainCommand, resolve
from ascendspeed.conversion.formats import registry
from ascendspeed.evaluation import args as evaluation_args
from ascendspeed.inference import args as inference_args
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils import atomic
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parents[1]
BASE = ["--model", "internlm-tiny", "--data-path", "data", "--train-iters", "6", "--seq-length", "64"]
WORDS = [
    *(
        "",
        "0",
        "-1",
        "1e400",
        "nan",
        "-inf",
        "99999999999999999999999999",
        "2147483648",
        "9223372036854775808",
    ),
    *("1.5", "1_000", "0x10", " 5 ", "abc", "$(id)", "a b", "/", "/etc/passwd", "/nonexistent/x", "None"),
    *("[]", "../..", "1,2,3", "0,0,0", "nan,1,1", "é" * 300, "x" * 5000, "--model", "-", "=", "caf\udcff"),
    *("a\0b", "a\nb"),
]


@pytest.mark.parametrize(
    "count", [pytest.param(20, id="short"), pytest.param(20_000, id="long", marks=pytest.mark.slow)]
)
def test_any_value_of_any_flag_of_training(count, tmp_path, monkeypatch):
    """A command line resolves, or is refused with one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    generator, findings = random.Random(1), Findings()
    flags = sorted(parser.spellings(TrainCommand))
    for _ in range(count):
        flag, word = generator.choice(flags), generator.choice([*WORDS, "loop"])
        words = [*BASE, *generator.choice([[flag], [flag, word], [f"{flag}={word}"]])]
        findings.case(f"{words[-2:]}", lambda words=words: (resolve(words, 1), None)[1])
    findings.check(refused=count // 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seed -1", "--seed -1: must be from 0 to 4294967295"),
        ("--seed 4294967296", "--seed 4294967296: must be from 0 to 4294967295"),
        ("--distributed-timeout-minutes 1e19", "--distributed-timeout-minutes 1e+19: must be at most 525600"),
        ("--hidden-size 2147483648", "--hidden-size 2147483648: must be below 2147483648"),
        ("--train-iters 99999999999999", "--train-iters 99999999999999: must be below 2147483648"),
    ],
)
def test_numbers_out_of_range(words, message):
    with pytest.raises(UserError) as error:
        resolve([*BASE, *words.split()], 1)
    assert str(error.value).startswith(message)


def test_a_step_that_does_not_exist(tmp_path):
    checkpoints.save(tmp_path / "ckpt", 10)
    path = tmp_path / "ckpt" / "step_0000500"
    message = f"there is no step_0000500 in {tmp_path}/ckpt; there are step_0000010"
    readers = (open_checkpoint, registry.open_reader, lambda p: inference_args.resolve(["--load", str(p)], 1))
    for read in readers:
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).removeprefix("--load: ") == message
    with pytest.raises(UserError, match=r"other is not a directory"):  # control
        open_checkpoint(tmp_path / "other")


def test_a_file_in_place_of_the_folder_of_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=f"tokenizer.model is a file: give its folder, {tmp_path}$"):
        tokenizer.load(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("path", ["..", "../..", "/", "."])
def test_a_file_to_write_has_a_name(path, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="is a directory: give the name of a file"):
        atomic.write_file(Path(path), "x")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b"]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("kept")
    (tmp_path / ".table.tmp").symlink_to(tmp_path / "secret")
    atomic.write_file(tmp_path / "table", "new")
    assert (tmp_path / "secret").read_text() == "kept"
    assert (tmp_path / "table").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["secret", "table"]


def test_a_device_is_not_replaced_by_a_file(tmp_path, monkeypatch):
    """As root, --output /dev/full removed the device of the machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "stdout").write_text("kept")  # /dev/stdout leads to a file if stdout is redirected
    monkeypatch.setattr(os, "devnull", str(tmp_path / "dev" / "null"))
    for path in (tmp_path / "pipe", tmp_path / "dev" / "stdout"):
        with pytest.raises(UserError, match=f"{path} cannot be written: it is a device or pipe, not a file"):
            atomic.write_file(path, "new")
        with pytest.raises(OSError, match="a device or pipe"), atomic.open_atomic(path):
            pass
        with pytest.raises(OSError, match="a device or pipe"):
            atomic.stage_file(path, "new")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "dev" / "stdout").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["dev", "pipe"]


COMMANDS = {
    "tasks/inference/generate.py": (inference_args.resolve, "--prompt", "--load", "--num-layers"),
    "tasks/evaluation/evaluation.py": (evaluation_args.resolve, "--task", "--load", "--num-layers"),
}


@pytest.mark.parametrize("path", COMMANDS)
def test_help_begins_with_an_example_and_what_people_use(path, monkeypatch, capsys):
    resolve_command, *flags = COMMANDS[path]
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        resolve_command(["--help"], 1)
    text = capsys.readouterr().out
    matches = [re.search(rf"^\W*{flag} ", text, re.MULTILINE) for flag in flags]
    positions = [text.index(f"python {path}"), *(match.start() for match in matches)]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("path", "older"),
    [
        ("tools/ckpt_convert/convert.py", "--to"),
        ("tools/lora/merge_lora.py", "--save"),
        ("tools/lora/export_lora.py", "--to"),
        ("tools/transformers/convert2hf_internlm.py", "--tgt"),
        ("tools/random_model.py", "--output-dir"),
        ("tools/compare_loss.py", "--out"),
        ("tools/perf_table.py", "--out"),
        ("tools/preprocess_data.py", "--output-prefix"),
        ("tools/convert_internevo_data.py", "--output-prefix"),
        ("tools/ckpt_convert/llama/convert_weights_to_huggingface.py", "--output-model-dir"),
        ("examples/intern/make_quickstart_data.py", "--output-dir"),
    ],
)
def test_the_output_flag_has_one_name(path, older):
    spec = importlib.util.spec_from_file_location(f"edges_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the docstrings of its flags are looked up there
    spec.loader.exec_module(module)
    fields = parser.spellings(module.Options)
    assert fields["--output"] == fields[older]
