"""Supervises a launcher: forwards signals to its ranks, restarts it, and returns the exit code of the ranks.

A launcher (`deepspeed`, `torchrun`) that receives a signal ends its ranks before they have saved. Signals are
therefore sent to the ranks themselves, and the launcher exits after them.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from ascendspeed.utils.errors import (
    EXIT_CODE_FILE,
    EXIT_INTERRUPTED,
    EXIT_RANK_LOST,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    RUNNING,
    UserError,
)

FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}
"""Signal received -> signal sent to the ranks. Training saves and stops on Ctrl-C as on SIGTERM."""
FORWARDED_QUIET = {**FORWARDED, signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGTERM}
"""Quiet: Ctrl-C ends one answer only, and a closed terminal does not reach the launcher's own session."""
NO_RESTART = (0, EXIT_USER_ERROR, EXIT_STOPPED)
SECONDARY_CODES = (256 - signal.SIGTERM, 256 - signal.SIGABRT)
"""Exit codes of DeepSpeed's launcher for a rank that ended by SIGTERM or SIGABRT."""
SECONDARY_SECONDS = 10
"""Time after Ctrl-C in which a rank that leaves may take others down with it, by one of the codes above."""
KILLED_CODES = (128 + signal.SIGKILL, 256 - signal.SIGKILL)
"""Exit codes of a shell and of DeepSpeed's launcher for a process that ended by SIGKILL."""
OUT_OF_MEMORY = "the kernel does that when memory runs out (dmesg tells)"
POLL_SECONDS = 0.1
TERM_ATTEMPTS = 100
KILL_ATTEMPTS = 100
"""Attempts, `POLL_SECONDS` apart, to end the processes of a run by SIGTERM, then by SIGKILL."""


class Supervisor:
    """Runs a launcher until it succeeds, is stopped, fails by a user error, or has no restart left.

    `quiet`: the launcher runs in a session of its own, because Ctrl-C at the terminal would end it. A guard
    ends all processes of the run if this process is killed; ranks without a launcher would keep the devices
    and go on saving. Signals are blocked and read one at a time (which needs a
    single thread), so that none is lost between two statements. A signal that was ignored at the start stays
    ignored.
    """

    def __init__(
        self, command: Sequence[str], restarts: int = 0, quiet: bool = False, remote_ranks: bool = False
    ) -> None:
        self._command = list(command)
        self._restarts = restarts
        self._quiet = quiet
        self._remote_ranks = remote_ranks
        self._forwarded = {
            received: sent
            for received, sent in (FORWARDED_QUIET if quiet else FORWARDED).items()
            if signal.getsignal(received) != signal.SIG_IGN
        }
        self._original_mask: set[signal.Signals] = set()
        self._exit_code_file = Path(os.devnull)
        self._stop_requested = False
        self._stopped_before_ranks = False
        self._interrupted = False
        self._ranks_interrupted_at = -float("inf")

    def run(self) -> int:
        """Runs the launcher, with restarts; returns the exit code of the ranks, or 128 + N after signal N."""
        self._original_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*self._forwarded, signal.SIGCHLD})
        descriptor, path = tempfile.mkstemp(prefix="exit_code_")
        os.close(descriptor)
        self._exit_code_file = Path(path)
        guard = Guard(self._exit_code_file)
        try:
            return self._run_with_restarts()
        finally:
            self._exit_code_file.unlink(missing_ok=True)
            guard.dismiss()
            signal.pthread_sigmask(signal.SIG_SETMASK, self._original_mask)

    def _run_with_restarts(self) -> int:
        restarts_left = 0 if self._quiet else self._restarts
        while True:
            code = self._run_once()
            if code in NO_RESTART or self._stop_requested or restarts_left == 0:
                return code
            _report(f"exit code {code}; starting again with --auto-resume (restarts left: {restarts_left})")
            restarts_left -= 1
            if "--auto-resume" not in self._command:
                self._command.append("--auto-resume")

    def _run_once(self) -> int:
        """Starts the launcher and waits for its end, forwarding signals."""
        self._exit_code_file.write_text("")
        self._launcher = self._start()
        while self._launcher.poll() is None:
            self._forward_next_signal(timeout=1)
        while self._forward_next_signal(timeout=0):  # sent while the launcher ended
            pass
        code = self._launcher.returncode
        code = code if code >= 0 else 128 - code
        code = self._code_of_ranks(code)
        if code or self._stopped_before_ranks:
            end_marked_processes(self._exit_code_file)
        if code in KILLED_CODES and not self._stop_requested:
            _report(f"exit code {code}: a process was killed (SIGKILL); {OUT_OF_MEMORY}")
        if code in SECONDARY_CODES and time.monotonic() - self._ranks_interrupted_at < SECONDARY_SECONDS:
            code = EXIT_INTERRUPTED
        if self._interrupted:
            _report("interrupted")
            code = EXIT_INTERRUPTED
        return code

    def _code_of_ranks(self, code: int) -> int:
        """Replaces the launcher's exit code where it does not tell how the ranks ended.

        torchrun ends with 1, whatever its ranks ended with, and DeepSpeed's runner with 0 if the launcher of
        the node was killed.
        """
        left = self._exit_code_file.read_text().strip()
        if code == 1 and left.isdigit():
            return int(left) or code
        is_lost = left == RUNNING or (not left and bool(marked_processes(self._exit_code_file)))
        if code or self._remote_ranks or not is_lost:
            return code
        _report("the launcher ended before its ranks (was it killed?); the ranks are ended too")
        return EXIT_RANK_LOST

    def _start(self) -> subprocess.Popen:
        """Starts the launcher with this process's stdin and original signal mask.

        Like a background job of a shell it ignores SIGINT and SIGQUIT until it installs handlers of its own.
        """

        def in_child() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGQUIT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._original_mask)

        environment = {**os.environ, EXIT_CODE_FILE: str(self._exit_code_file)}
        try:
            return subprocess.Popen(
                self._command, env=environment, start_new_session=self._quiet, preexec_fn=in_child
            )
        except OSError as error:
            problem = f"cannot start {self._command[0]}: {error.strerror}"
            raise UserError(f"{problem}; activate the environment first: source tools/setup.sh") from None

    def _forward_next_signal(self, timeout: float) -> bool:
        """Waits for a signal or the end of the launcher; returns whether a signal came."""
        received = signal.sigtimedwait({*self._forwarded, signal.SIGCHLD}, timeout)
        if received is None:
            return False
        if received.si_signo in self._forwarded:
            self._forward(self._forwarded[received.si_signo])
        return True

    def _forward(self, number: signal.Signals) -> None:
        if number == signal.SIGUSR1 and self._remote_ranks:
            _report("signals do not reach the ranks of a HOSTFILE: send SIGUSR1 to one of them, on its node")
            return
        if number != signal.SIGINT:
            self._stop_requested = True
        # All are found before the first signal: handlers change as ranks leave.
        pending = rank_signals(self._launcher.pid, number)
        for rank, rank_signal in pending:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(rank_signal)
        if number == signal.SIGINT:
            if any(rank_signal == signal.SIGINT for _, rank_signal in pending):
                self._ranks_interrupted_at = time.monotonic()
            else:
                self._interrupted = True
        if not pending:  # still starting, or on other nodes
            self._stopped_before_ranks = True
            self._launcher.terminate()


def rank_signals(pid: int, number: signal.Signals) -> list[tuple[psutil.Process, signal.Signals]]:
    """Finds the ranks among process `pid` and its descendants, and the signal that each should get.

    A rank that does not catch SIGINT gets SIGTERM instead. A launcher sets RANK for its ranks only.
    """
    try:
        process = psutil.Process(pid)
        if "RANK" in _environment(process):
            catches = number != signal.SIGINT or catches_sigint(pid)
            return [(process, number if catches else signal.SIGTERM)]
        children = process.children()
    except psutil.Error:
        return []
    return [pair for child in children for pair in rank_signals(child.pid, number)]


def catches_sigint(pid: int) -> bool:
    """Returns True if a process handles SIGINT (ranks inherit SIG_IGN). psutil does not give signal masks."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) & 1 << (signal.SIGINT - 1))
    return False


def marked_processes(exit_code_file: Path) -> list[psutil.Process]:
    """The living processes with this EXIT_CODE_FILE in their environment."""
    return [
        process
        for process in psutil.process_iter()
        if _environment(process).get(EXIT_CODE_FILE) == str(exit_code_file)
    ]


def end_marked_processes(exit_code_file: Path) -> None:
    """Ends every process with this EXIT_CODE_FILE in its environment, including orphans and new processes."""
    for attempt in range(TERM_ATTEMPTS + KILL_ATTEMPTS):
        marked = marked_processes(exit_code_file)
        if not marked:
            return
        for process in marked:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM if attempt < TERM_ATTEMPTS else signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _environment(process: psutil.Process) -> dict[str, str]:
    """Returns the environment a process was started with; empty if it ended or belongs to another user."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


class Guard:
    """Process in a session of its own that ends the marked processes if this process dies, even by SIGKILL.

    It reads from a pipe whose other end only this process holds: data dismisses it, end of file is the death.
    """

    def __init__(self, exit_code_file: Path) -> None:
        read_end, self._write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._watch(read_end, exit_code_file)
            finally:
                os._exit(0)
        os.close(read_end)

    @staticmethod
    def _watch(read_end: int, exit_code_file: Path) -> None:
        os.setsid()
        read_end = fcntl.fcntl(read_end, fcntl.F_DUPFD, 3)  # 0, 1 and 2 may have been closed
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        for name in os.listdir("/proc/self/fd"):  # the other end of the pipe among them
            if int(name) > 2 and int(name) != read_end:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        if not os.read(read_end, 1):
            end_marked_processes(exit_code_file)
            exit_code_file.unlink(missing_ok=True)

    def dismiss(self) -> None:
        """Ends the guard."""
        os.write(self._write_end, b"x")
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def _report(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed stderr must not end the supervision
        print(text, file=sys.stderr, flush=True)
