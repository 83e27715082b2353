"""Start and errors of a run in its log file: time, host, command line and commit."""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

LOG_NAME = "train.log"
DEFAULT_LOG_DIR = "logs"
ROOT = Path(__file__).resolve().parents[2]


class RunRecord:
    """Describes a run for its log file, also before its flags are known to be valid."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words`: the command line, script first."""
        self._words = list(words)
        self._has_start = False

    def start_line(self) -> str:
        """Time, host, command line and commit, which the log has before anything else of the run."""
        self._has_start = True
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        recipe = os.environ.get("RECIPE", "")
        command = f"{recipe}: {shlex.join(self._words)}" if recipe else shlex.join(self._words)
        return f"start: {now}, host {os.uname().nodename}, commit {commit()}: {command}"

    def write_error(self, text: str) -> None:
        """Appends an error to the log; a log that cannot be written must not hide the error itself."""
        lines = [] if self._has_start else [self.start_line()]
        with contextlib.suppress(OSError, ValueError):
            folder = Path(self.log_dir())
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / LOG_NAME, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n".join([*lines, text, ""]))

    def log_dir(self) -> str:
        """Value of --log-dir on the command line."""
        folder = DEFAULT_LOG_DIR
        for i, word in enumerate(self._words):
            name, equals, value = word.partition("=")
            if name.replace("_", "-") == "--log-dir":
                folder = value if equals else next(iter(self._words[i + 1 : i + 2]), folder)
        return folder


def commit() -> str:
    """Short name of the commit that runs, "+ changes" if files differ from it; "unknown" outside of git."""
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
