"""The one error that a user can cause, and how a program ends: one line on stderr, no traceback, an exit code that says why."""

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
"""A process of the run died, was stopped or left; training can be started again (EX_UNAVAILABLE of sysexits.h)."""
EXIT_STOPPED = 75
"""Saved and stopped because a signal asked for it; training can be started again (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C: 130, as every program of a shell."""
EXIT_TERMINATED = 128 + signal.SIGTERM

LAUNCHER_GRACE_SECONDS = 5
"""Seconds in which a launcher ends the other processes of a run after one has left."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""

    code = EXIT_USER_ERROR
    """Exit code of a program that ends on it."""


class RankLost(UserError):
    """Another process of the run is gone."""

    code = EXIT_RANK_LOST


def run(main: Callable[[], int | None], clean_up: bool = False) -> None:
    """Runs `main` and exits with its return value, or with one line and the error's code on a `UserError` or Ctrl-C.

    `clean_up`: SIGTERM too leaves `main` by an exception, so that what it has begun to write goes away. Training, which
    waits for the end of the iteration instead (`watch`), does without.
    """
    logging.configure()
    if clean_up:
        signal.signal(signal.SIGTERM, _leave)
    try:
        code = main() or 0
    except UserError as error:
        report_error(error)
        code = error.code
    except KeyboardInterrupt:
        code = _end("interrupted", EXIT_INTERRUPTED)
    except _Terminated:
        code = _end("terminated", EXIT_TERMINATED)
    _note(code)
    sys.exit(code)


class _Terminated(SystemExit):
    """No `Exception`, which code that others' data runs through catches."""


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would break into the cleaning up
    raise _Terminated(EXIT_TERMINATED)


def _end(word: str, code: int) -> int:
    print(word, file=sys.stderr, flush=True)
    return code


def _note(code: int) -> None:
    """Leaves the code of a node's first rank where EXIT_CODE_FILE says: torchrun makes every one of them 1.

    A good end is not left: another rank may have failed after it, and torchrun's 1 must then stand.
    """
    path = os.environ.get("EXIT_CODE_FILE")
    if code and path and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(str(code))


def report_error(error: UserError) -> None:
    """Says the one line.

    Under a launcher every rank usually meets the same error. Rank 0 speaks at once; the others wait a moment, in which the
    launcher ends them, so that the line stands there once. An error that only one rank meets is still said, with its number.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(LAUNCHER_GRACE_SECONDS)
    who = f"[rank {rank}] " if rank else ""
    print(f"{who}error: {error}", file=sys.stderr, flush=True)
