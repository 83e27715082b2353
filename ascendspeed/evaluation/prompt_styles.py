"""Prompt builders that reproduce the published evaluation programs byte for byte.

`lm-eval` is lm-evaluation-harness 0.4.13, `hendrycks` the MMLU authors' evaluate.py, `opencompass`
OpenCompass' *_ppl configurations. They differ in spaces and newlines, which affect a model: scores are
comparable only within one style.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ascendspeed.evaluation.questions import LETTERS, Question
from ascendspeed.evaluation.subjects import SubjectInfo

BuildContext = Callable[[SubjectInfo, Sequence[Question], Question], str]
"""(subject, examples, question) -> text before the answer."""


@dataclass(frozen=True)
class PromptStyle:
    """Prompts of one task in one style."""

    context: BuildContext
    choices: Callable[[Question], Sequence[str]]
    """Answers to compare; empty if the answer is generated."""
    delimiter: str = " "
    """Text between context and answer."""
    num_shots: int | None = None
    """The only number of examples that the style defines; None: any."""
    until: tuple[str, ...] = ()
    """Strings that end a generated answer."""


def letters(question: Question) -> Sequence[str]:
    """Answers A, B, C, D."""
    return LETTERS


def texts(question: Question) -> Sequence[str]:
    """Answers in full."""
    return question.choices


def right_letter(question: Question) -> str:
    """Letter of the right choice."""
    return LETTERS[question.answer]


def right_text(question: Question) -> str:
    """Text of the right choice."""
    return question.choices[question.answer]


def _options(question: Question) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))


def harness_context(
    head: str, write: Callable[[Question], str], answer: Callable[[Question], str]
) -> BuildContext:
    """Context of lm-evaluation-harness: description, examples with an empty line after each, question."""

    def context(subject: SubjectInfo, shots: Sequence[Question], question: Question) -> str:
        examples = "".join(f"{write(shot)} {answer(shot)}\n\n" for shot in shots)
        return head.format(subject.title) + examples + write(question)

    return context


def harness_choice(head: str, cue: str) -> PromptStyle:
    """Multiple-choice style of lm-evaluation-harness: options, then `cue`."""
    context = harness_context(head, lambda q: f"{q.text.strip()}{_options(q)}\n{cue}", right_letter)
    return PromptStyle(context, letters)


MMLU_HEAD = "The following are multiple choice questions (with answers) about  {}.\n\n"
"""The double space is original: the authors' program puts a space before every word of the subject."""


def hendrycks_context(subject: SubjectInfo, shots: Sequence[Question], question: Question) -> str:
    """Context of the MMLU authors' program."""
    examples = "".join(f"{shot.text}{_options(shot)}\nAnswer: {right_letter(shot)}\n\n" for shot in shots)
    return f"{MMLU_HEAD.format(subject.title)}{examples}{question.text}{_options(question)}\nAnswer:"


def opencompass_mmlu_context(subject: SubjectInfo, shots: Sequence[Question], question: Question) -> str:
    """MMLU context of OpenCompass: examples end with a newline and are joined by one; another follows, even
    without examples.
    """
    examples = "\n".join(f"{shot.text}{_options(shot)}\nAnswer: {right_letter(shot)}\n" for shot in shots)
    return f"{MMLU_HEAD.format(subject.title)}{examples}\n{question.text}{_options(question)}\nAnswer:"


def opencompass_choice(head: str, cue: str, delimiter: str) -> PromptStyle:
    """Multiple-choice style of OpenCompass: dialogue rounds joined by newlines, with a line "\\n" after each
    and after all.
    """

    def context(subject: SubjectInfo, shots: Sequence[Question], question: Question) -> str:
        def ask(q: Question) -> str:
            return f"{head.format(subject.title)}{q.text}{_options(q)}{cue}"

        lines = []
        for shot in shots:
            lines += [f"{ask(shot)}{delimiter}{right_letter(shot)}", "\n"]
        return "\n".join([*lines, "\n", ask(question)])

    return PromptStyle(context, letters, delimiter)
