"""Formats lists, errors and sizes for one-line messages."""

from collections.abc import Sequence


def shorten_list(names: Sequence[object], limit: int = 5, more: str = "more") -> str:
    """`a, b and 3 more`: the first `limit` items of a list and the number of the others."""
    shown = ", ".join(str(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit:,} {more}" if len(names) > limit else shown


def first_line(error: BaseException, limit: int | None = None) -> str:
    """First line of an error's message, or its class if it has none; at most `limit` characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:limit]


def readable_size(size: float) -> str:
    """`3.2 MB`, `14.60 GB`: a number of bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
