"""Compares the names that a file or folder holds with the names that it should hold."""

import re
from collections.abc import Iterable
from pathlib import Path

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list


def check_names(
    path: Path,
    expected: Iterable[str],
    actual: Iterable[str],
    ignored: Iterable[str] = (),
    of: str = "the model of its config.json",
) -> None:
    """Raises `UserError` naming missing and superfluous names; `ignored`: regular expressions of superfluous
    ones to accept.
    """
    expected = set(expected)
    actual = set(actual)
    missing = sorted(expected - actual)
    superfluous = sorted(
        name for name in actual - expected if not any(re.fullmatch(pattern, name) for pattern in ignored)
    )
    problems = []
    if missing:
        problems.append(f"it lacks {shorten_list(missing)}")
    if superfluous:
        problems.append(f"it has left over {shorten_list(superfluous)}")
    if problems:
        raise UserError(f"{path} does not hold {of}: {'; '.join(problems)}")
