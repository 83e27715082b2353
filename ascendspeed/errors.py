"""The one error that a user can cause, and how a program ends on it: one line on stderr, exit code 2, no traceback."""

import os
import sys
import time
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its return value, or with 2 and one line on a `UserError`.

    Under a launcher every rank usually meets the same error. Rank 0 speaks at once; the others wait a moment, in which the
    launcher ends them, so that the line stands there once. An error that only one rank meets is still said, with its number.
    """
    try:
        sys.exit(main())
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(5)
        who = f"[rank {rank}] " if rank else ""
        print(f"{who}error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
