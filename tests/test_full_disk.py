"""Commands whose output is larger than it may be: one line that names the file, exit code 2, nothing left."""

import contextlib
import errno
import io
import os
import resource
import runpy
import shutil
import sys
import traceback
from pathlib import Path

import pytest
from helpers.corpus import sentencepiece_dir
from helpers.evaluating import put_jsonl
from helpers.peft_folders import base_folder, model_of, save_adapter

from ascendspeed.utils import atomic, errors
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parents[1]
LIMIT = 20_000
"""Bytes that a file may have: less than the weights and the ids below."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    home = tmp_path_factory.mktemp("full")
    sentencepiece_dir(home / "tokenizer", 400)
    put_jsonl(home / "rows.jsonl", [{"text": "as many words as are needed here " * 20}] * 200)
    base_folder("llama", home / "base")
    save_adapter(model_of("llama")[0], home / "adapter", target_modules=["q_proj"])
    return home


def limited(script: str, words: list[str], error_file: Path) -> int:
    """Exit code of a script that runs in a forked process with a limit for the size of files."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code, stderr = 1, io.StringIO()
    try:
        sys.dont_write_bytecode = True  # a file of it would be cut off and stay
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        sys.argv = [script, *words]
        with contextlib.redirect_stderr(stderr):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # the test shows it
        stderr.write(traceback.format_exc())
    finally:
        error_file.write_text(stderr.getvalue())
        os._exit(code)


COMMANDS = {
    "convert": ("tools/ckpt_convert/convert.py", "--from {0}/base --format megatron"),
    "merge": ("tools/lora/merge_lora.py", "--base {0}/base --adapter {0}/adapter"),
    "random model": ("tools/random_model.py", "--model internlm-tiny"),
    "preprocess": (
        "tools/preprocess_data.py",
        "--input {0}/rows.jsonl --tokenizer-name-or-path {0}/tokenizer --workers 1",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_grow(command, inputs, tmp_path):
    script, words = COMMANDS[command]
    folder = tmp_path / "out"
    folder.mkdir()
    output = ["--output", str(folder / "result")]
    code = limited(script, [*words.format(inputs).split(), *output], tmp_path / "stderr")
    text = (tmp_path / "stderr").read_text()
    assert code == 2, text
    assert text.startswith(f"error: {folder / 'result'}"), text
    assert "File too large" in text or "a file may have 20,000 bytes (ulimit -f)" in text
    assert text.count("\n") == 1
    assert not list(folder.iterdir())


def test_a_full_disk_is_named_with_its_space(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "sync_file", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 300_000))
    (tmp_path / "x").write_text("before")
    with pytest.raises(UserError) as error:
        atomic.write_file(tmp_path / "x", "text")
    reason = f"No space left on device (0.3 MB are free in {tmp_path})"
    assert str(error.value) == f"{tmp_path / 'x'} cannot be written: {reason}"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"
    assert errors.EXIT_USER_ERROR == error.value.code == 2
