"""Formats lists, errors and sizes for one-line messages, and parses sizes."""

import re
from collections.abc import Sequence

from ascendspeed.utils.errors import UserError


def shorten_list(names: Sequence[object], limit: int = 5, more: str = "more") -> str:
    """`a, b and 3 more`: the first `limit` items of a list and the number of the others."""
    shown = ", ".join(str(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit:,} {more}" if len(names) > limit else shown


def shorten(value: object) -> str:
    """Repr of a value for an error message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: BaseException, limit: int | None = None) -> str:
    """First line of an error's message, or its class if it has none; at most `limit` characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:limit]


def readable_size(size: float) -> str:
    """`3.2 MB`, `14.60 GB`: a number of bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def parse_size(text: int | str) -> int:
    """Bytes of '10GB', '500MB', '2GiB' or a number. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    size = 0.0
    if match:
        base = 1024 if match[3] else 1000
        size = float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")
    if size < 1:
        raise UserError(f"{text!r} is not a size: write 10GB, 500MB or a number of bytes")
    return int(size)


def nearest_multiples(number: int, divisor: int) -> str:
    """Returns the nearest multiples of `divisor` around `number`, as text."""
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def divisors(number: int) -> str:
    """Returns the divisors of `number`, as text."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
