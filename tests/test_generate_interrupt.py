"""Ctrl-C in a conversation: ends the answer, which stays in the history as shown; at the prompt, ends the
conversation."""

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
"""An answer too long to be completed in a test."""


def history_of_chat(cpu, folder, monkeypatch, on_part) -> list:
    """Returns the history of two questions at a terminal; `on_part(parts)` is called with the parts shown so
    far."""
    from ascendspeed.inference import chat, runner

    parts, conversations = [], []

    class Terminal:
        @staticmethod
        def isatty() -> bool:
            return True

    def read():
        return stdin.UserMessage(questions.pop(0)) if questions else None

    def show(text):
        parts.append(text)
        on_part(parts)

    questions = ["hi", "again"]
    monkeypatch.setattr(sys, "stdin", Terminal)
    monkeypatch.setattr(chat, "write_stdout", show)
    monkeypatch.setattr(runner, "read_stdin_message", read)
    monkeypatch.setattr(
        runner, "Conversation", lambda *a: conversations.append(chat.Conversation(*a)) or conversations[0]
    )
    job, notes = args.resolve(
        ["--load", str(folder), "--device", "cpu", "--task", "chat", "--max-new-tokens", "12"], 1
    )
    runner.run(job, cpu, notes)
    return conversations[0].history


def test_interrupted_answer_stays_as_shown(cpu, folder, monkeypatch):
    """The first answer ends after its third part; the second one depends on it and is complete."""
    before = signal.getsignal(signal.SIGINT)
    complete = history_of_chat(cpu, folder, monkeypatch, lambda parts: None)
    cut = history_of_chat(
        cpu, folder, monkeypatch, lambda parts: len(parts) == 3 and signal.raise_signal(signal.SIGINT)
    )
    assert signal.getsignal(signal.SIGINT) is before
    first, second = ([message.content for message in history[1::2]] for history in (complete, cut))
    assert first[0].startswith(second[0])
    assert 0 < len(second[0]) < len(first[0])
    assert cut[0] == complete[0]
    assert [message.role for message in cut] == ["user", "assistant"] * 2
    assert second[1] != first[1]  # control: the history differs

    def impatient(parts):
        if len(parts) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        history_of_chat(cpu, folder, monkeypatch, impatient)
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A command in a pseudo-terminal, with its output."""

    def __init__(self, *command: str, **env: str) -> None:
        self.master, slave = pty.openpty()

        def become_foreground() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a shell at a terminal does

        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        environment = launch.environment(TERM="dumb", **env)
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=launch.ROOT,
            start_new_session=True,
            preexec_fn=become_foreground,
            **streams,
        )
        self.slave, self.shown = slave, ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Returns the next output up to the pattern."""
        end = time.monotonic() + seconds
        os.set_blocking(self.master, False)
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-2000:]!r}"
            assert self.process.poll() is None, self.shown[-2000:]
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        text, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.slave)
        os.close(self.master)


def run_dialogue(terminal: Terminal) -> None:
    """Ends two answers by Ctrl-C, then the conversation."""
    try:
        terminal.until("or leave\r?\n> ")
        for question in ("hi", "again"):
            terminal.type(f"{question}\n")
            terminal.until(f"{question}\r?\n")
            terminal.until("[^\r\n]{20}")  # the answer has begun
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


@pytest.mark.slow
def test_at_a_terminal(folder):
    run_dialogue(
        Terminal(
            sys.executable, "tasks/inference/generate.py", "--load", str(folder), "--device", "cpu", *LONG
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [("1", "1"), ("2", "1"), ("1", "2")])
def test_through_the_recipe(folder, tp, pp):
    """One process, and two under DeepSpeed's launcher: every rank ends the answer at the same token."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    values = {
        "CHECKPOINT": str(folder),
        "TOKENIZER_PATH": "",
        "DTYPE": "fp32",
        "MASTER_PORT": str(launch.free_port()),
    }
    script = "examples/intern/generate_internlm_7b_deepspeed.sh"
    flags = ["--distributed-backend", "auto", "--device", "cpu", *LONG]
    run_dialogue(Terminal("bash", script, *flags, PATH=path, TP=tp, PP=pp, **values))
