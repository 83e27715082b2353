"""Failure of a program: one line, an exit code for the reason, and no partial files."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import launch

from ascendspeed.utils import errors

ROOT = Path(__file__).parent.parent

PROGRAM = """
import sys, time
from ascendspeed.utils import errors
def main():
    try:
        print("begun", flush=True)
        try:
            time.sleep(60)
        except Exception:
            pass
    finally:
        time.sleep(float(sys.argv[2]))
        print("cleaned up", flush=True)
if __name__ == "__main__":
    errors.run(main, clean_up=sys.argv[1] == "True")
"""


def ended(clean_up: bool, *signals: int) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program that was sent the signals, a moment between them."""
    words = [
        sys.executable,
        "-c",
        textwrap.dedent(PROGRAM),
        str(clean_up),
        "0.5" if len(signals) > 1 else "0",
    ]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as program:
        assert program.stdout.readline() == "begun\n"
        for number in signals:
            program.send_signal(number)
            time.sleep(0.1)
        out, err = program.communicate(timeout=60)
    return program.returncode, out, err


@pytest.mark.parametrize("clean_up", [False, True])
def test_ctrl_c_is_one_line(clean_up):
    assert ended(clean_up, signal.SIGINT) == (130, "cleaned up\n", "interrupted\n")


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_lets_a_program_clean_up(times):
    assert ended(True, *[signal.SIGTERM] * times) == (143, "cleaned up\n", "terminated\n")
    assert ended(False, signal.SIGTERM) == (-signal.SIGTERM, "", "")  # control


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_conversion_that_is_stopped_leaves_nothing(number, tmp_path):
    words = [sys.executable, ROOT / "tools/random_model.py", "--output-dir", tmp_path / "out"]
    words += ["--model", "internlm2-1.8b", "--dtype", "bf16"]  # large enough not to be done in a moment
    draft = tmp_path / ".out.partial"
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as program:
        while not draft.exists() and program.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3)
        assert list(draft.iterdir())
        program.send_signal(number)
        _, err = program.communicate(timeout=120)
    assert program.returncode == 128 + number
    assert err.splitlines()[-1] in ("interrupted", "terminated")
    assert "Traceback" not in err
    assert not os.listdir(tmp_path)


def test_ctrl_c_after_the_work_is_no_traceback():
    """The interpreter's shutdown would print one; the control ends without `errors.run`."""
    late = "import atexit, os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    late += "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    code = late + "from ascendspeed.utils import errors; errors.run(lambda: 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    control = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, cwd=ROOT)
    assert "KeyboardInterrupt" in control.stderr


def test_codes():
    assert (errors.EXIT_INTERRUPTED, errors.EXIT_TERMINATED) == (130, 143)


@pytest.mark.parametrize(("rank", "ends", "left"), [("0", 75, "75"), ("1", 75, None), ("0", 0, "0")])
def test_the_first_rank_of_a_node_leaves_its_code(tmp_path, rank, ends, left):
    path = tmp_path / "code"
    code = "from ascendspeed.utils import errors; errors.run(lambda: ENDS)".replace("ENDS", str(ends))
    env = launch.environment(LOCAL_RANK=rank, EXIT_CODE_FILE=str(path))
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == ends
    assert (path.read_text() if path.exists() else None) == left
