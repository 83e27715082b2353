"""Types of a loaded benchmark, independent of its files: questions, subjects, benchmark."""

from dataclasses import dataclass
from pathlib import Path

from ascendspeed.evaluation.subjects import SubjectInfo

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A question and its answer, verbatim."""

    id: str
    """Subject, split and index: `anatomy/test/7`."""
    location: str
    """File and line."""
    text: str
    choices: tuple[str, ...]
    """Possible answers; empty if the answer is generated."""
    answer: int | str
    """Index of the right choice, or the text of the answer."""
    passage: str = ""
    """Text that the question is about."""


@dataclass(frozen=True)
class Subject:
    """Questions with a common title and common examples."""

    info: SubjectInfo
    shots: tuple[Question, ...]
    """Few-shot examples, in the order of their file."""
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Benchmark:
    """All questions of a task."""

    name: str
    folder: Path
    subjects: tuple[Subject, ...]
    custom: bool = False
    """True for a user-provided dataset in the benchmark's format."""

    @property
    def size(self) -> int:
        """Number of questions."""
        return sum(len(subject.questions) for subject in self.subjects)
