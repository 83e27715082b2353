"""Standard streams of a command: closed pipes, full disks and closed descriptors end no work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import corpus, forkserver, launch

from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

PROGRAM = """
import sys
from pathlib import Path
from ascendspeed.utils import errors
def main():
    for line in range(20_000):
        print("line", line, "\\u00e9")
    print("an error, \\u00e9", file=sys.stderr)
    Path(sys.argv[1]).write_text("done")
    return int(sys.argv[2])
errors.run(main)
"""


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("| true", 0, ""),
        ("| head -1", 0, ""),
        (">&-", 0, ""),
        ("2>&- >/dev/null", 0, ""),
        ("2>/dev/full >/dev/null", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 2, "error: stdout cannot be written: No space left on device; all else is done"),
    ],
)
@pytest.mark.parametrize("own_code", [0, 1])
def test_output_that_is_lost_ends_no_work(redirection, code, message, own_code, tmp_path):
    """The work and its exit code remain, with a line unless the reader has closed the pipe."""
    line = f'"$0" -c "$1" "$2" {own_code} {redirection}'
    words = ["bash", "-o", "pipefail", "-c", line, sys.executable, PROGRAM, tmp_path / "result"]
    done = subprocess.run(words, env=launch.environment(), capture_output=True, text=True, cwd=tmp_path)
    assert (tmp_path / "result").read_text() == "done"
    assert done.returncode == (own_code or code)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[1:] == ([message] if message else [])


def test_characters_that_the_locale_lacks_are_escaped(tmp_path):
    words = [sys.executable, "-c", PROGRAM, tmp_path / "result", "0"]
    env = launch.environment(PYTHONIOENCODING="ascii", LC_ALL="C")
    done = subprocess.run(words, env=env, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"an error, \\xe9\n")
    assert done.stdout.endswith(b"line 19999 \\xe9\n")


def test_commands_on_a_full_disk(tmp_path):
    """Their files are complete; the loss of stdout is reported, and the exit code is that of an error."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one two"}) + "\n")
    corpus.sentencepiece_dir(tmp_path / "tokenizer", 400)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, "loss": 3.0}) + "\n" for step in range(1, 9)))
    commands = {
        "tools/random_model.py": ["--output", tmp_path / "model"],
        "tools/preprocess_data.py": [
            *("--input", tmp_path / "text.jsonl", "--tokenizer-name-or-path", tmp_path / "tokenizer"),
            *("--output", tmp_path / "data", "--workers", "1"),
        ],
        "tools/compare_loss.py": [log, log, "--output", tmp_path / "parity"],
    }
    for path, words in commands.items():
        log_file = tmp_path / "stderr"
        log_file.unlink(missing_ok=True)
        process = forkserver.start_script(
            launch.ROOT / path,
            [*map(str, words)],
            launch.environment(),
            Path("/dev/full"),
            tmp_path,
            log_file,
        )
        process.join(120)
        text = log_file.read_text()
        assert process.exitcode == 2, (path, text)
        assert "Traceback" not in text
        assert text.splitlines()[-1].startswith("error: stdout cannot be written"), (path, text)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert (tmp_path / "data_text_document.idx").exists()
    assert (tmp_path / "parity" / "parity.html").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / ("x" * 300)).read_bytes(), "the name is too long"),
        (lambda folder: folder.read_bytes(), "it is a directory"),
        (lambda folder: (folder / "none" / "x").read_bytes(), "there is no such file or directory"),
        (lambda folder: (folder / "loop" / "x").read_bytes(), "symbolic links in a circle"),
        (
            lambda folder: (folder / "line\nbreak").read_bytes(),
            "line\\\\nbreak: there is no such file",
        ),
        (lambda folder: bytearray(1 << 62), "not enough memory"),
    ],
)
def test_an_error_of_the_system_is_one_line(make, message, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((OSError, MemoryError)) as error:
        make(tmp_path)
    text = str(errors.as_user_error(error.value))
    assert message.replace("\\\\", "\\") in text
    assert "\n" not in text


def test_a_mistake_in_the_code_stays_a_traceback():
    assert errors.as_user_error(ValueError("x")) is None
    assert errors.as_user_error(ConnectionResetError(104, "reset")) is None
    assert errors.as_user_error(OSError(5, "Input/output error", "disk")) is None


def test_a_message_is_one_line_that_a_terminal_does_not_interpret():
    assert str(UserError("a\nb\x1b[31m\u2028c 书")) == "a\\nb\\x1b[31m\\u2028c 书"
