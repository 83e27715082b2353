"""What a benchmark consists of, whatever files it came in."""

from dataclasses import dataclass
from pathlib import Path

from ascendspeed.evaluation.subjects import Topic

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question and its answer, verbatim."""

    id: str
    """Subject, split and number from 0: `anatomy/test/7`."""
    where: str
    """File and line."""
    text: str
    choices: tuple[str, ...]
    """Of which one is right; empty where the answer is to be written."""
    answer: int | str
    """Number of the right choice from 0, or the answer as text."""
    passage: str = ""
    """What the question is about."""


@dataclass(frozen=True)
class Subject:
    """Questions that are asked under one title, after the same examples."""

    topic: Topic
    shots: tuple[Question, ...]
    """Examples, in the order of their file."""
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Benchmark:
    """A whole task."""

    name: str
    folder: Path
    subjects: tuple[Subject, ...]
    own: bool = False
    """Whether the set is one of one's own, in the shape of the published one."""

    @property
    def size(self) -> int:
        """Number of questions."""
        return sum(len(subject.questions) for subject in self.subjects)
