"""`UserError` and exit codes: a command ends with one line on stderr and a code that gives the cause."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from ascendspeed.utils import logging, streams

EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 69
"""A process of the run died, stopped or exited; training can be restarted (EX_UNAVAILABLE of sysexits.h)."""
EXIT_STOPPED = 75
"""Saved and stopped after a signal; training can be restarted (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C: 130, the convention of shells."""
EXIT_TERMINATED = 128 + signal.SIGTERM

EXIT_CODE_FILE = "EXIT_CODE_FILE"
"""Environment variable with the path where a rank leaves its exit code; it marks every process of a run."""
RUNNING = "running"
"""Content of that file while the rank runs: a run that ends like that was cut off."""
LAUNCHER_GRACE_SECONDS = 5
"""Seconds in which a launcher ends the other processes of a run after one has exited."""


ENDLESS_WORD = re.compile(r"\S{500,}")
CONTROL_CHARACTERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")
FILE_ERRORS = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the disk is read-only",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed here (ulimit -f)",
    errno.EMFILE: "too many open files: raise the limit with ulimit -n",
    errno.ENFILE: "too many open files on this machine",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "symbolic links in a circle",
    errno.ENOENT: "there is no such file or directory",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.EISDIR: "it is a directory",
    errno.EEXIST: "it exists",
    errno.ENOTEMPTY: "the directory is not empty",
    errno.ENXIO: "it is a device or socket",
    errno.ENODEV: "it is a device or socket",
}
"""Errors of the operating system that the user can correct, and their text."""
RUNTIME_ERRORS = {
    "allocate memory": "not enough memory",
    "Storage size calculation overflowed": "a tensor would be larger than any memory",
    "Symlink loop": "symbolic links in a circle",
    "Too many open files": "too many open files: raise the limit with ulimit -n",
}
"""Part of a library's RuntimeError -> the text for the user."""


class UserError(Exception):
    """Invalid input. The message is one line: what is wrong, where, and what to do."""

    code = EXIT_USER_ERROR
    """Exit code of a program that ends with this error."""

    def __str__(self) -> str:
        """The message: control characters, such as line breaks in a file's name, are escaped, and endless
        words are shortened.
        """
        text = escape_control_characters(super().__str__())
        return ENDLESS_WORD.sub(lambda match: f"{match[0][:200]}...{match[0][-100:]}", text)


class RankLost(UserError):
    """Another process of the run has died or does not respond."""

    code = EXIT_RANK_LOST


def escape_control_characters(text: str) -> str:
    """Text as one line that no terminal interprets."""
    return CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], text)


def as_user_error(error: BaseException) -> UserError | None:
    """Returns the one-line form of an exception whose cause is the machine or a file, not a mistake in the
    code; None for any other exception.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if _is_path(name)]
        return UserError(": ".join([*names[:1], FILE_ERRORS[error.errno]]))
    if isinstance(error, MemoryError):
        return UserError(f"not enough memory: {error}" if str(error) else "not enough memory")
    if isinstance(error, RuntimeError):
        texts = [text for part, text in RUNTIME_ERRORS.items() if part in str(error)]
        return UserError(f"{texts[0]} ({_first_line(error)})") if texts else None
    return None


def _is_path(name: object) -> bool:
    return isinstance(name, str | bytes | os.PathLike)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def run(
    main: Callable[[], int | None], clean_up: bool = False, record: Callable[[str], None] | None = None
) -> None:
    """Runs `main` and exits with its return value, or with one line and the error's code on a `UserError`, a
    file that cannot be used, or Ctrl-C.

    Output that nobody reads does not end the work: printing goes on without effect. If it is lost for
    another reason than a closed pipe, the command fails when its work is done.
    `clean_up`: SIGTERM and SIGHUP raise an exception in `main`, so that unfinished output is deleted.
    Training does not use it: there SIGTERM takes effect at the end of the iteration
    (`fault_tolerance.stop_signals`).
    `record`: also receives the text of every error, and the traceback of an unexpected one.
    """
    streams.protect()
    threading.excepthook = _report_thread
    logging.configure()
    _write_exit_code(RUNNING)
    if clean_up:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, _raise_terminated)
    try:
        code = main() or 0
        if loss := streams.unreported_loss():
            report_error(UserError(f"stdout cannot be written: {loss.strerror}; all else is done"))
            code = code or EXIT_USER_ERROR
        with contextlib.suppress(ValueError):  # not in the main thread
            # All is done: Ctrl-C could only add a traceback of the interpreter's shutdown.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except Exception as error:
        known = as_user_error(error)
        text = report_error(known) if known else traceback.format_exc().rstrip()
        if record:
            record(text)
        if known is None:
            raise
        code = known.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    except _Terminated as error:
        with contextlib.suppress(OSError):  # after a hang-up there is no terminal
            print("terminated", file=sys.stderr, flush=True)
        code = error.exit_code
    except SystemExit as error:  # --help
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        _write_exit_code(str(code))
        raise
    _write_exit_code(str(code))
    sys.exit(code)


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Reports an exception that ended a thread: one line for a full disk and the like."""
    known = as_user_error(failure.exc_value) if failure.exc_value else None
    if known is None:
        threading.__excepthook__(failure)
    else:
        name = failure.thread.name if failure.thread else "a thread"
        print(f"warning: {name} has stopped: {known}", file=sys.stderr, flush=True)


class _Terminated(SystemExit):
    """SIGTERM or SIGHUP, as an exception that `except Exception` does not catch."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.exit_code = 128 + number


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the clean-up
    raise _Terminated(number)


def _write_exit_code(text: str) -> None:
    """Writes the exit code of a node's first rank to the file EXIT_CODE_FILE: launchers hide it (torchrun
    ends with 1 for every failure, DeepSpeed's runner with 0 after its launcher was killed).
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(text)


def report_error(error: UserError) -> str:
    """Prints the error to stderr and returns the text.

    Under a launcher usually every rank raises the same error. Rank 0 prints at once; the others first wait
    for the launcher to end them, so that the line appears once. An error of a single other rank is printed
    with its number.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(LAUNCHER_GRACE_SECONDS)
    prefix = f"[rank {rank}] " if rank else ""
    text = f"{prefix}error: {error}"
    print(text, file=sys.stderr, flush=True)
    return text
