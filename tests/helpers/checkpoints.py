"""Training checkpoints for tests."""

import itertools
import os
import signal
from pathlib import Path

from ascendspeed.utils.errors import UserError


def in_child(work) -> int:
    """Runs work() in a forked process; returns its wait status."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except UserError:
            os._exit(2)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die_at(count: int, monkeypatch) -> None:
    """SIGKILL at the `count`-th operation that changes files."""
    left = itertools.count(count, -1)

    def deadly(real):
        def call(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in [(os, n) for n in ("rename", "replace", "unlink", "rmdir", "fsync")] + [
        (Path, n) for n in ("mkdir", "unlink")
    ]:
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
