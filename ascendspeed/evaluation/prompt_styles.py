"""Questions -> prompts, byte for byte as the programs write them that published figures come from.

`lm-eval` is lm-evaluation-harness 0.4.13, `hendrycks` the MMLU authors' evaluate.py, `opencompass` OpenCompass' *_ppl
configurations. They differ in blanks and newlines, which a model notices: figures are comparable only in the same style.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ascendspeed.evaluation.questions import LETTERS, Question
from ascendspeed.evaluation.subjects import Topic
from ascendspeed.utils.errors import UserError

SHOTS = {"mmlu": 5, "ceval": 5, "cmmlu": 5, "boolq": 0, "gsm8k": 5, "hellaswag": 0}
"""Examples before a question, where the user does not say."""
Context = Callable[[Topic, Sequence[Question], Question], str]


@dataclass(frozen=True)
class Style:
    """How one task is put."""

    context: Context
    """(topic, examples, question) -> all that stands before the answer."""
    choices: Callable[[Question], Sequence[str]]
    """The answers to compare; none where the answer is to be written."""
    delimiter: str = " "
    """Between the two."""
    shots: int | None = None
    """The only number of examples that it knows; None: any."""
    until: tuple[str, ...] = ()
    """What ends a written answer."""


def style(name: str, task: str, shots: int) -> Style:
    """Raises `UserError` when the task is not put in this style."""
    found = STYLES[name].get(task)
    if found is None:
        known = [other for other, tasks in STYLES.items() if task in tasks]
        raise UserError(f"--prompt-style {name} does not say how to put {task}; choose {' or '.join(known)}")
    if found.shots is not None and shots != found.shots:
        raise UserError(
            f"--prompt-style {name} puts {task} with {found.shots} examples; leave --num-fewshot {shots} out"
        )
    return found


def _options(question: Question) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))


def _letters(question: Question) -> Sequence[str]:
    return LETTERS


def _choices(question: Question) -> Sequence[str]:
    return question.choices


def _harness(head: str, put: Callable[[Question], str], answer: Callable[[Question], str]) -> Context:
    """lm-evaluation-harness: a description, examples with an empty line after each, the question."""

    def context(topic: Topic, shots: Sequence[Question], question: Question) -> str:
        examples = "".join(f"{put(shot)} {answer(shot)}\n\n" for shot in shots)
        return head.format(topic.title) + examples + put(question)

    return context


def _harness_choice(head: str, cue: str) -> Style:
    context = _harness(head, lambda q: f"{q.text.strip()}{_options(q)}\n{cue}", _letter)
    return Style(context, _letters)


def _letter(question: Question) -> str:
    return LETTERS[question.answer]


def _chosen(question: Question) -> str:
    return question.choices[question.answer]


ABOUT = "The following are multiple choice questions (with answers) about  {}.\n\n"
"""Two blanks: the authors' program puts one before every word of the subject, and one before them all."""


def _hendrycks(topic: Topic, shots: Sequence[Question], question: Question) -> str:
    examples = "".join(f"{shot.text}{_options(shot)}\nAnswer: {_letter(shot)}\n\n" for shot in shots)
    return f"{ABOUT.format(topic.title)}{examples}{question.text}{_options(question)}\nAnswer:"


def _opencompass_mmlu(topic: Topic, shots: Sequence[Question], question: Question) -> str:
    """Examples end with a newline, are joined by one, and one follows, even where there are none."""
    examples = "\n".join(f"{shot.text}{_options(shot)}\nAnswer: {_letter(shot)}\n" for shot in shots)
    return f"{ABOUT.format(topic.title)}{examples}\n{question.text}{_options(question)}\nAnswer:"


def _opencompass_choice(ask: str, cue: str, delimiter: str) -> Style:
    """Rounds of asking and replying, a line for each, with another line that is only a newline after each and after all of them."""

    def context(topic: Topic, shots: Sequence[Question], question: Question) -> str:
        asked = [f"{ask.format(topic.title)}{q.text}{_options(q)}{cue}" for q in (*shots, question)]
        lines = [
            line
            for text, shot in zip(asked, shots, strict=False)
            for line in (f"{text}{delimiter}{_letter(shot)}", "\n")
        ]
        return "\n".join([*lines, "\n", asked[-1]])

    return Style(context, _letters, delimiter)


STYLES: dict[str, dict[str, Style]] = {
    "lm-eval": {
        "mmlu": _harness_choice(
            "The following are multiple choice questions (with answers) about {}.\n\n", "Answer:"
        ),
        "ceval": _harness_choice("以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n", "答案："),
        "cmmlu": _harness_choice("以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "答案："),
        "boolq": Style(
            _harness("", lambda q: f"{q.passage}\nQuestion: {q.text}?\nAnswer:", _chosen), _choices
        ),
        "gsm8k": Style(
            _harness("", lambda q: f"Question: {q.text}\nAnswer:", lambda q: q.answer),
            lambda q: (),
            until=("Question:", "</s>", "<|im_end|>"),
        ),
        "hellaswag": Style(_harness("", lambda q: q.text, _chosen), _choices),
    },
    "opencompass": {
        "mmlu": Style(_opencompass_mmlu, _letters),
        "ceval": _opencompass_choice(
            "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n", "\n答案: ", "\n"
        ),
        "cmmlu": _opencompass_choice(
            "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n题目：", "\n答案是:", " "
        ),
        "boolq": Style(
            lambda topic, shots, q: f"{q.passage}\nQuestion: {q.text}?",
            lambda q: ("No", "Yes"),
            "\n",
            shots=0,
        ),
    },
    "hendrycks": {"mmlu": Style(_hendrycks, _letters)},
}
