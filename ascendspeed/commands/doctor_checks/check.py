"""Result of one check of `intern doctor`."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """A finding, and the command that mends it."""

    name: str
    status: Status
    value: str
    remedy: str = ""
    """Command or advice; empty if nothing has to be done."""
