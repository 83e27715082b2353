"""`UserError` and exit codes: a command ends with one line on stderr and a code that gives the cause."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from ascendspeed.utils import logging

EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 69
"""A process of the run died, stopped or exited; training can be restarted (EX_UNAVAILABLE of sysexits.h)."""
EXIT_STOPPED = 75
"""Saved and stopped after a signal; training can be restarted (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C: 130, the convention of shells."""
EXIT_TERMINATED = 128 + signal.SIGTERM

LAUNCHER_GRACE_SECONDS = 5
"""Seconds in which a launcher ends the other processes of a run after one has exited."""


class UserError(Exception):
    """Invalid input. The message is one line: what is wrong, where, and what to do."""

    code = EXIT_USER_ERROR
    """Exit code of a program that ends with this error."""


class RankLost(UserError):
    """Another process of the run has died or does not respond."""

    code = EXIT_RANK_LOST


def run(main: Callable[[], int | None], clean_up: bool = False) -> None:
    """Runs `main` and exits with its return value, or with one line and the error's code on a `UserError` or
    Ctrl-C.

    `clean_up`: SIGTERM and SIGHUP raise an exception in `main`, so that unfinished output is deleted.
    Training does not use it: there SIGTERM takes effect at the end of the iteration
    (`fault_tolerance.stop_signals`).
    """
    logging.configure()
    if clean_up:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, _raise_terminated)
    try:
        code = main() or 0
        with contextlib.suppress(ValueError):  # not in the main thread
            # All is done: Ctrl-C could only add a traceback of the interpreter's shutdown.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except UserError as error:
        report_error(error)
        code = error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    except _Terminated as error:
        with contextlib.suppress(OSError):  # after a hang-up there is no terminal
            print("terminated", file=sys.stderr, flush=True)
        code = error.exit_code
    _write_exit_code(code)
    sys.exit(code)


class _Terminated(SystemExit):
    """SIGTERM or SIGHUP, as an exception that `except Exception` does not catch."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.exit_code = 128 + number


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the clean-up
    raise _Terminated(number)


def _write_exit_code(code: int) -> None:
    """Writes the code of a node's first rank to the file EXIT_CODE_FILE: torchrun replaces every code by 1.

    Success is not written: another rank may fail later, and torchrun's 1 must then stand.
    """
    path = os.environ.get("EXIT_CODE_FILE")
    if code and path and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(str(code))


def report_error(error: UserError) -> None:
    """Prints the error to stderr.

    Under a launcher usually every rank raises the same error. Rank 0 prints at once; the others first wait
    for the launcher to end them, so that the line appears once. An error of a single other rank is printed
    with its number.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(LAUNCHER_GRACE_SECONDS)
    prefix = f"[rank {rank}] " if rank else ""
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
