"""Prompts within the model's length limit, and their token ids.

Few-shot examples that do not fit are dropped, the last one first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ascendspeed.evaluation.prompt_styles import PromptStyle
from ascendspeed.evaluation.questions import Benchmark, Question, Subject
from ascendspeed.tokenization.tokenizer import Tokenizer

CACHED_CONTEXTS = 1 << 16


@dataclass(frozen=True)
class Prompt:
    """A question with its context and possible answers."""

    task: str
    subject: str
    question: Question
    context: str
    choices: tuple[str, ...]
    delimiter: str
    until: tuple[str, ...]
    num_shots: int
    """Examples in the context."""
    truncated: int
    """Tokens to remove at the beginning, because the question alone is too long."""

    @property
    def answers(self) -> list[str]:
        """Texts that may follow the context."""
        return [self.delimiter + choice for choice in self.choices]


class PromptEncoder:
    """Encodes text with one BOS; separates context and continuation as lm-evaluation-harness does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos_ids = [] if tokenizer.bos is None else [tokenizer.bos]
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Returns BOS and the ids of a context; recent contexts are cached."""
        if text not in self._cache:
            if len(self._cache) > CACHED_CONTEXTS:
                self._cache.clear()
            self._cache[text] = self.encode_batch([text])[0]
        return self._cache[text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns BOS and the ids of each text."""
        return [[*self.bos_ids, *ids.tolist()] for ids in self.tokenizer.encode_batch(texts)]

    def encode_pairs(self, context: str, continuations: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Returns the ids of the context and of each continuation: those that the whole text has beyond the
        context.

        Trailing white space of the context belongs to the continuation, as tokenizers merge it with what
        follows.
        """
        head = self.encode(context.rstrip())
        pairs = []
        for ids in self.encode_batch([context + continuation for continuation in continuations]):
            # If the continuation merges with the end of the context, so that the whole text has no more ids,
            # its last id is the continuation.
            split = len(head) if len(ids) > len(head) else len(ids) - 1
            pairs.append((head if len(ids) > len(head) else ids[:split], ids[split:]))
        return pairs


def build_prompts(
    benchmark: Benchmark, style: PromptStyle, encoder: PromptEncoder, max_length: int, new_tokens: int
) -> Iterator[Prompt]:
    """Yields the prompts of a benchmark, in the order of its files.

    `max_length`: most tokens of the model's input; `new_tokens`: tokens of it that are reserved for a
    generated answer.
    """
    for subject in benchmark.subjects:
        for question in subject.questions:
            limit = max_length if style.choices(question) else max_length - new_tokens
            yield _fit(benchmark.name, subject, question, style, encoder, limit)


def _fit(
    task: str,
    subject: Subject,
    question: Question,
    style: PromptStyle,
    encoder: PromptEncoder,
    max_length: int,
) -> Prompt:
    """Builds the prompt with the most examples that fit."""
    choices = tuple(style.choices(question))
    answers = [style.delimiter + choice for choice in choices]
    for num_shots in range(len(subject.shots), -1, -1):
        context = style.context(subject.info, subject.shots[:num_shots], question)
        excess = _length(context, answers, encoder, max_length) - max_length
        if excess <= 0 or not num_shots:
            return Prompt(
                task=task,
                subject=subject.info.name,
                question=question,
                context=context,
                choices=choices,
                delimiter=style.delimiter,
                until=style.until,
                num_shots=num_shots,
                truncated=max(excess, 0),
            )
    raise AssertionError("the loop ends with a prompt without examples")


def _length(context: str, answers: list[str], encoder: PromptEncoder, max_length: int) -> int:
    """Returns the length of the model's input: all tokens but the last one of the longest answer.

    The result is an upper bound if that bound is within `max_length`, and exact otherwise.
    """
    if not answers:
        return len(encoder.encode(context))
    stripped = context.rstrip()
    longest_answer = max(
        len(answer.encode()) for answer in answers
    )  # an answer has no more tokens than bytes
    bound = len(encoder.encode(stripped)) + len(context) - len(stripped) + longest_answer
    if bound <= max_length:
        return bound
    return max(len(head) + len(tail) for head, tail in encoder.encode_pairs(context, answers)) - 1


def truncate_left(tokens: list[int], max_length: int, num_bos: int) -> list[int]:
    """Returns the last `max_length` tokens, including the first `num_bos` ones (BOS)."""
    excess = len(tokens) - max_length
    return tokens if excess <= 0 else tokens[:num_bos] + tokens[num_bos + excess :]
