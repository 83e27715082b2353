"""A needle in a haystack: texts of a wanted length in tokens, with one sentence somewhere in them that is asked for."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ascendspeed.utils.errors import UserError

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The magic number of the day is {number}."
QUESTION = "What is the magic number of the day? Answer with the number alone."
ENDS = re.compile(r"(?<=[.!?。！？])\s+|\n+")

Count = Callable[[Sequence[str]], list[int]]
"""Texts -> how many tokens each of them has."""


@dataclass(frozen=True)
class Cell:
    """One question: how long the text is, how deep the needle lies, and which try it is."""

    length: int
    """Tokens that the whole prompt may have."""
    depth: float
    """Percent of the text that comes before the needle."""
    trial: int

    @property
    def key(self) -> str:
        """Its name in a file of answers."""
        return f"{self.length} tokens, {self.depth:g} %, {self.trial}"


def cells(lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
    """All of them, the shortest texts first. Raises `UserError`."""
    for flag, values, least, most in (("--lengths", lengths, 1, float("inf")), ("--depths", depths, 0, 100)):
        wrong = [value for value in values if not least <= value <= most]
        if not values or wrong or len(set(values)) < len(values):
            raise UserError(
                f"{flag} {' '.join(map(str, values))}: give different numbers"
                + (f", not {wrong[0]}" if wrong else "")
            )
    return [
        Cell(length, depth, trial)
        for length in sorted(lengths)
        for depth in sorted(depths)
        for trial in range(trials)
    ]


def number(seed: int, cell: Cell) -> str:
    """Seven digits that belong to a cell."""
    return str(random.Random(f"{seed}: {cell.key}").randrange(1_000_000, 10_000_000))


def sentences(paths: Sequence[str]) -> list[str]:
    """Of text files, in their order; without any the filler. Raises `UserError`."""
    found: list[str] = []
    for path in paths:
        try:
            found += [part.strip() for part in ENDS.split(Path(path).read_text()) if part.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--haystack {path}: cannot be read: {error}") from None
    if paths and not found:
        raise UserError(f"--haystack {' '.join(paths)}: there is no text in it")
    return found or list(FILLER)


def text(cell: Cell, needle: str, hay: Sequence[str], sizes: Sequence[int], room: int) -> str:
    """`room` tokens of hay (`sizes`: of each sentence, at least 1), again from the start when it ends, the needle between two."""
    taken, used = [], 0
    while (size := sizes[len(taken) % len(hay)]) + used <= room:
        taken.append(hay[len(taken) % len(hay)])
        used += size
    at = round(cell.depth / 100 * len(taken))
    return " ".join([*taken[:at], needle, *taken[at:]])


def found(answer: str, wanted: str) -> bool:
    """Whether the answer says what was wanted, whatever the case and the spaces."""
    return "".join(wanted.casefold().split()) in "".join(answer.casefold().split())
