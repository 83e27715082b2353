"""Prompts that fit: examples are dropped one by one, the last one first, only where a prompt would be too long; and their ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ascendspeed.evaluation.prompt_styles import Style
from ascendspeed.evaluation.questions import Benchmark, Question, Subject
from ascendspeed.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """One question as it is put."""

    task: str
    subject: str
    question: Question
    context: str
    choices: tuple[str, ...]
    delimiter: str
    until: tuple[str, ...]
    shots: int
    """Examples before it."""
    cut: int
    """Tokens that had to go at its beginning, because it is too long without any example."""

    @property
    def answers(self) -> list[str]:
        """What may follow the context."""
        return [self.delimiter + choice for choice in self.choices]


class Encoder:
    """Text -> ids with one BOS, as lm-evaluation-harness parts a context from what follows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = [] if tokenizer.bos is None else [tokenizer.bos]
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """BOS and the ids of a context; those of the last ones are remembered."""
        if text not in self._known:
            if len(self._known) > 1 << 16:
                self._known.clear()
            self._known[text] = self.batch([text])[0]
        return self._known[text]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """BOS and the ids of each."""
        return [[*self.start, *ids.tolist()] for ids in self.tokenizer.encode_batch(texts)]

    def pairs(self, context: str, continuations: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids of the context and of each continuation after it: those that the whole text has more than the context.

        White space at the end of a context belongs to what follows, as tokenizers have it.
        """
        kept = context.rstrip()
        head = self.encode(kept)
        wholes = self.batch([context + continuation for continuation in continuations])
        # An answer that melts into the end of the context, so that the whole text has no more ids, is the last one of these.
        return [
            (head, whole[len(head) :]) if len(whole) > len(head) else (whole[:-1], whole[-1:])
            for whole in wholes
        ]


def prepare(
    benchmark: Benchmark, style: Style, encoder: Encoder, room: int, new_tokens: int
) -> Iterator[Prompt]:
    """The prompts of a benchmark, in the order of its files.

    `room`: tokens that the model may be given; `new_tokens`: of these, for an answer that is written.
    """
    for subject in benchmark.subjects:
        for question in subject.questions:
            yield _fit(
                benchmark.name,
                subject,
                question,
                style,
                encoder,
                room if style.choices(question) else room - new_tokens,
            )


def _fit(
    task: str, subject: Subject, question: Question, style: Style, encoder: Encoder, room: int
) -> Prompt:
    choices = tuple(style.choices(question))
    for shots in range(len(subject.shots), -1, -1):
        context = style.context(subject.topic, subject.shots[:shots], question)
        over = _length(context, [style.delimiter + choice for choice in choices], encoder, room) - room
        if over <= 0 or not shots:
            return Prompt(
                task,
                subject.topic.name,
                question,
                context,
                choices,
                style.delimiter,
                style.until,
                shots,
                max(over, 0),
            )
    raise AssertionError("without examples there is always a prompt")


def _length(context: str, answers: list[str], encoder: Encoder, room: int) -> int:
    """Tokens that go into the model: all but the last one of the longest answer. Exact where it matters."""
    if not answers:
        return len(encoder.encode(context))
    length = len(encoder.encode(context.rstrip()))
    most = length + len(context) - len(context.rstrip()) + max(len(answer.encode()) for answer in answers)
    if most <= room:  # an answer has no more tokens than bytes
        return most
    return max(len(head) + len(tail) for head, tail in encoder.pairs(context, answers)) - 1


def clip(tokens: list[int], room: int, start: int) -> list[int]:
    """The last `room` tokens, with the first `start` ones (BOS) kept."""
    over = len(tokens) - room
    return tokens if over <= 0 else tokens[:start] + tokens[start + over :]
