"""Texts for the needle-in-a-haystack test: filler of a given length with one sentence to retrieve."""

import random
import re
from collections.abc import Sequence
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
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


@dataclass(frozen=True)
class Cell:
    """One prompt of the test."""

    length: int
    """Largest number of tokens of the prompt."""
    depth: float
    """Percent of the text before the needle."""
    trial: int

    @property
    def key(self) -> str:
        """Key in the file of answers."""
        return f"{self.length} tokens, {self.depth:g} %, {self.trial}"


def make_cells(lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Cell]:
    """Returns the cells of all combinations, the shortest texts first. Raises UserError."""
    _check_values("--lengths", lengths, 1, float("inf"))
    _check_values("--depths", depths, 0, 100)
    return [
        Cell(length, depth, trial)
        for length in sorted(lengths)
        for depth in sorted(depths)
        for trial in range(trials)
    ]


def _check_values(flag: str, values: Sequence[float], lowest: float, highest: float) -> None:
    wrong = [value for value in values if not lowest <= value <= highest]
    if not values or wrong or len(set(values)) < len(values):
        bad_value = f", not {wrong[0]}" if wrong else ""
        raise UserError(f"{flag} {' '.join(map(str, values))}: give different numbers{bad_value}")


def magic_number(seed: int, cell: Cell) -> str:
    """Returns seven digits determined by the seed and the cell."""
    return str(random.Random(f"{seed}: {cell.key}").randrange(1_000_000, 10_000_000))


def read_sentences(paths: Sequence[str]) -> list[str]:
    """Returns the sentences of text files in their order, or the filler if there are no files.

    Raises UserError.
    """
    sentences: list[str] = []
    for path in paths:
        try:
            parts = SENTENCE_END.split(Path(path).read_text("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--haystack {path}: cannot be read: {error}") from None
        sentences += [part.strip() for part in parts if part.strip()]
    if paths and not sentences:
        raise UserError(f"--haystack {' '.join(paths)}: there is no text in it")
    return sentences or list(FILLER)


def build_text(
    cell: Cell, needle: str, sentences: Sequence[str], sizes: Sequence[int], max_tokens: int
) -> str:
    """Returns at most `max_tokens` tokens of sentences, repeated if needed, with the needle between two of
    them.

    `sizes`: tokens of each sentence, at least 1.
    """
    chosen: list[str] = []
    used = 0
    while (size := sizes[len(chosen) % len(sentences)]) + used <= max_tokens:
        chosen.append(sentences[len(chosen) % len(sentences)])
        used += size
    split = round(cell.depth / 100 * len(chosen))
    return " ".join([*chosen[:split], needle, *chosen[split:]])


def contains_answer(answer: str, expected: str) -> bool:
    """True if the answer contains the expected text, ignoring case and white space."""
    return "".join(expected.casefold().split()) in "".join(answer.casefold().split())
