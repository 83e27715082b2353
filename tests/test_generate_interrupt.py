"""Ctrl-C in a conversation: the answer ends where it is and is remembered so; at the prompt the conversation ends."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers import launch
from helpers.generate_command import folder, reference, run

from ascendspeed.inference import args, stdin
from ascendspeed.utils.errors import EXIT_INTERRUPTED

LONG = ["--task", "chat", "--max-new-tokens", "20000"]
"""Nobody waits for the end of such an answer."""


def said_in(cpu, folder, monkeypatch, heard) -> list:
    """History of a conversation of two questions at a terminal; `heard(pieces)` is called with the pieces shown so far."""
    from ascendspeed.inference import chat, runner

    pieces, talks = [], []

    class Terminal:
        @staticmethod
        def isatty() -> bool:
            return True

    def read():
        return stdin.UserMessage(words.pop(0)) if words else None

    def show(text):
        pieces.append(text)
        heard(pieces)

    words = ["hi", "again"]
    monkeypatch.setattr(sys, "stdin", Terminal)
    monkeypatch.setattr(chat, "write_stdout", show)
    monkeypatch.setattr(runner, "read_stdin_message", read)
    monkeypatch.setattr(runner, "Conversation", lambda *a: talks.append(chat.Conversation(*a)) or talks[0])
    job, notes = args.resolve(
        ["--load", str(folder), "--device", "cpu", "--task", "chat", "--max-new-tokens", "12"], 1
    )
    runner.run(job, cpu, notes)
    return talks[0].history


def test_what_was_written_is_the_answer(cpu, folder, monkeypatch):
    """The first answer ends after its third piece; the second one follows from that, and is whole."""
    before = signal.getsignal(signal.SIGINT)
    whole = said_in(cpu, folder, monkeypatch, lambda pieces: None)
    cut = said_in(
        cpu, folder, monkeypatch, lambda pieces: len(pieces) == 3 and signal.raise_signal(signal.SIGINT)
    )
    assert signal.getsignal(signal.SIGINT) is before
    first, second = ([message.content for message in history[1::2]] for history in (whole, cut))
    assert first[0].startswith(second[0])
    assert 0 < len(second[0]) < len(first[0])
    assert cut[0] == whole[0]
    assert [message.role for message in cut] == ["user", "assistant"] * 2
    assert second[1] != first[1]  # control: it was asked after another answer

    def impatient(pieces):
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        said_in(cpu, folder, monkeypatch, impatient)
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A command at a terminal of its own, and what it has shown there."""

    def __init__(self, *command: str, **env: str) -> None:
        self.master, slave = pty.openpty()

        def own() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as of a shell at a terminal

        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        environment = launch.environment(TERM="dumb", **env)
        self.process = subprocess.Popen(
            command, env=environment, cwd=launch.ROOT, start_new_session=True, preexec_fn=own, **streams
        )
        self.slave, self.shown = slave, ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What is shown next, up to the pattern."""
        end = time.monotonic() + seconds
        os.set_blocking(self.master, False)
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-2000:]!r}"
            assert self.process.poll() is None, self.shown[-2000:]
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.slave)
        os.close(self.master)


def talk(terminal: Terminal) -> None:
    """Two answers that Ctrl-C ends, and Ctrl-C at the prompt."""
    try:
        terminal.until("or leave\r?\n> ")
        for question in ("hi", "again"):
            terminal.type(f"{question}\n")
            terminal.until(f"{question}\r?\n")
            terminal.until("[^\r\n]{20}")  # it is at it
            terminal.type("\x03")
            terminal.until("\r?\n> ")
        terminal.type("\x03")
        terminal.until("interrupted")
        code = terminal.process.wait(60)
        with contextlib.suppress(BlockingIOError):
            terminal.shown += os.read(terminal.master, 65536).decode(errors="replace")
        assert code == EXIT_INTERRUPTED, terminal.shown
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()


def test_at_a_terminal(folder):
    talk(
        Terminal(
            sys.executable, "tasks/inference/generate.py", "--load", str(folder), "--device", "cpu", *LONG
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [("1", "1"), ("2", "1"), ("1", "2")])
def test_through_the_recipe(folder, tp, pp):
    """One process, and two under DeepSpeed's launcher, which Ctrl-C would end: every rank ends the answer at the same token."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    values = {
        "CHECKPOINT": str(folder),
        "TOKENIZER_PATH": "",
        "DTYPE": "fp32",
        "MASTER_PORT": str(launch.free_port()),
    }
    script = "examples/intern/generate_internlm_7b_deepspeed.sh"
    flags = ["--distributed-backend", "auto", "--device", "cpu", *LONG]
    talk(Terminal("bash", script, *flags, PATH=path, TP=tp, PP=pp, **values))
