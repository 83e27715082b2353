"""The benchmarks as they lie on disk. A task is loaded whole or not at all: what is missing, double or ragged is an error."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed.evaluation.questions import LETTERS, Benchmark, Question, Subject
from ascendspeed.evaluation.readers import csv_rows, json_rows, parquet_rows, text_of
from ascendspeed.evaluation.subjects import TOPICS, Topic, own
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

OWN = "subjects.csv"
"""Beside a set of one's own, in the shape of a published one: a headed CSV, subject,category."""
NOT_YET = {"agieval": "AGIEval", "bbh": "BBH", "human_eval": "HumanEval", "humaneval": "HumanEval"}
SHOWN = 6


@dataclass(frozen=True)
class Layout:
    """How the files of a benchmark with subjects are called."""

    scored: str
    """The split whose questions are asked; the examples are in dev."""
    inside: tuple[str, ...]
    """Folders to look into for the splits, beside the given one."""
    file: str
    columns: tuple[str, ...] | None
    """Names of question, A, B, C, D and answer in a headed file; None: a headless one."""
    parquet: tuple[str, ...]
    """The same names in the hub's parquet files; with `choices` for A to D."""


LAYOUTS = {
    "mmlu": Layout("test", ("", "data"), "{subject}_{split}.csv", None, ("question", "choices", "answer")),
    "ceval": Layout(
        "val",
        ("", "formal_ceval"),
        "{subject}_{split}.csv",
        ("question", *LETTERS, "answer"),
        ("question", *LETTERS, "answer"),
    ),
    "cmmlu": Layout(
        "test",
        ("", "data"),
        "{subject}.csv",
        ("Question", *LETTERS, "Answer"),
        ("Question", *LETTERS, "Answer"),
    ),
}


def load(task: str, folder: str | Path, shots: int, limit: int | None = None) -> Benchmark:
    """The benchmark `task` in `folder`, with `shots` examples for each subject, and all questions or the first `limit` of each.

    Raises `UserError` with file and line.
    """
    folder = Path(folder)
    if task in NOT_YET:
        raise UserError(f"--task {task}: {NOT_YET[task]} is not there yet; there are {', '.join(TASKS)}")
    if task not in TASKS:
        raise UserError(f"--task {task} does not exist; there are {', '.join(TASKS)}")
    if not folder.is_dir():
        raise UserError(f"--task-data-path {folder} of {task} is not a directory")
    found = TASKS[task](task, folder, shots)
    for subject in found.subjects:
        if not subject.questions:
            raise UserError(f"{folder}: {task} has no questions in {subject.topic.name}")
        if len(subject.shots) < shots:
            raise UserError(
                f"{folder}: {task} has {len(subject.shots)} examples for {subject.topic.name}, fewer than --num-fewshot {shots}"
            )
    if limit is None:
        return found
    subjects = tuple(Subject(s.topic, s.shots, s.questions[:limit]) for s in found.subjects)
    return Benchmark(found.name, found.folder, subjects, found.own)


def _by_subject(task: str, folder: Path, shots: int) -> Benchmark:
    layout = LAYOUTS[task]
    topics = _own_topics(folder / OWN) if (folder / OWN).is_file() else TOPICS[task]
    root = next(
        (folder / inside for inside in layout.inside if (folder / inside / layout.scored).is_dir()), None
    )
    if root is not None:
        pattern = re.escape(layout.file.format(subject="@", split=layout.scored)).replace("@", "(.+)")
        matches = (re.fullmatch(pattern, path.name) for path in sorted((root / layout.scored).iterdir()))
        names = [match[1] for match in matches if match]
        where, read = root / layout.scored, _csv_reader(layout, root)
    else:
        names = sorted({path.parent.name for path in folder.glob(f"*/{layout.scored}-*.parquet")} - {"all"})
        where, read = folder, _parquet_reader(layout, folder)
    if not names:
        file = layout.file.format(subject="SUBJECT", split=layout.scored)
        raise UserError(
            f"{folder} holds no {task}: looked for {layout.scored}/{file} and SUBJECT/{layout.scored}-*.parquet"
        )
    _check_subjects(task, where, names, topics)
    subjects = []
    for name, topic in topics.items():
        examples = tuple(read(name, "dev"))[:shots] if shots else ()
        subjects.append(Subject(topic, examples, tuple(read(name, layout.scored))))
    return Benchmark(task, folder, tuple(subjects), topics is not TOPICS[task])


def _own_topics(path: Path) -> dict[str, Topic]:
    rows = list(csv_rows(path, ("subject", "category")))
    double = [name for name, times in Counter(row[0] for _, row in rows).items() if times > 1]
    if double:
        raise UserError(f"{path} names {', '.join(double)} twice")
    if not rows:
        raise UserError(f"{path} names no subject")
    return own(dict(row for _, row in rows), str(path))


def _check_subjects(task: str, where: Path, names: Sequence[str], topics: dict[str, Topic]) -> None:
    missing, unknown = [n for n in topics if n not in names], [n for n in names if n not in topics]
    faults = [
        f"{what} {shorten_list(found, SHOWN)}"
        for what, found in (("lacks", missing), ("has", unknown))
        if found
    ]
    if faults:
        what = "which it does not know" if unknown else f"of its {len(topics)} subjects"
        raise UserError(
            f"{where}: {task} {' and '.join(faults)}, {what}; a set of your own says its subjects in {OWN} (subject,category)"
        )


Read = Callable[[str, str], Iterator[Question]]
"""(subject, split) -> its questions."""


def _csv_reader(layout: Layout, root: Path) -> Read:
    def read(subject: str, split: str) -> Iterator[Question]:
        path = root / split / layout.file.format(subject=subject, split=split)
        rows = csv_rows(path, layout.columns, width=6)
        return (
            _choice(f"{subject}/{split}/{i}", where, row[0], row[1:5], row[5])
            for i, (where, row) in enumerate(rows)
        )

    return read


def _parquet_reader(layout: Layout, folder: Path) -> Read:
    def read(subject: str, split: str) -> Iterator[Question]:
        paths = sorted((folder / subject).glob(f"{split}-*.parquet"))
        if not paths:
            raise UserError(f"{folder / subject} has no {split}-*.parquet")
        for i, (where, (text, *options, answer)) in enumerate(parquet_rows(paths, layout.parquet)):
            options = options[0] if len(options) == 1 else options
            letter = LETTERS[answer] if isinstance(answer, int) and 0 <= answer < len(LETTERS) else answer
            yield _choice(f"{subject}/{split}/{i}", where, text, options, letter)

    return read


def _choice(name: str, where: str, text: Any, options: Any, answer: Any) -> Question:
    """A question with four choices."""
    if (
        not isinstance(options, list)
        or len(options) != 4
        or not all(isinstance(x, str) for x in (text, *options))
    ):
        raise UserError(
            f"{where}: a question and four choices should stand here as text, not {text!r}, {options!r}"
        )
    if answer not in tuple(LETTERS):
        raise UserError(f"{where}: the answer {answer!r} is not one of A, B, C, D")
    return Question(name, where, text, tuple(options), LETTERS.index(answer))


def _single(
    scored: Sequence[str], examples: Sequence[str], read: Callable[[str, str, dict[str, Any]], Question]
) -> Callable[[str, Path, int], Benchmark]:
    """A benchmark without subjects: one JSON-lines file of questions and one of examples, under one of these names."""

    def load(task: str, folder: Path, shots: int) -> Benchmark:
        questions = _read_all(_one_of(task, folder, scored), task, "scored", read)
        first = _read_all(_one_of(task, folder, examples), task, "train", read, shots) if shots else ()
        return Benchmark(task, folder, (Subject(Topic(task, task, task), first, questions),))

    return load


def _read_all(
    path: Path,
    task: str,
    split: str,
    read: Callable[[str, str, dict[str, Any]], Question],
    most: int | None = None,
) -> tuple[Question, ...]:
    found: list[Question] = []
    for i, (where, row) in enumerate(json_rows(path)):
        if i == most:
            break
        found.append(read(f"{task}/{split}/{i}", where, row))
    return tuple(found)


def _one_of(task: str, folder: Path, names: Iterable[str]) -> Path:
    there = [folder / name for name in names if (folder / name).is_file()]
    if len(there) != 1:
        held = (
            f"holds {' and '.join(p.name for p in there)}: remove one of them"
            if there
            else f"lacks {' or '.join(names)}"
        )
        raise UserError(f"{folder}: {task} {held}")
    return there[0]


def _boolq(name: str, where: str, row: dict[str, Any]) -> Question:
    answer = row.get("label", row.get("answer"))  # SuperGLUE's name, and that of the original
    if not isinstance(answer, bool):
        raise UserError(f"{where}: 'label' is {answer!r}, where true or false should be")
    return Question(
        name,
        where,
        text_of(where, row, "question"),
        ("no", "yes"),
        int(answer),
        text_of(where, row, "passage"),
    )


def _gsm8k(name: str, where: str, row: dict[str, Any]) -> Question:
    answer = text_of(where, row, "answer")
    if not re.search(r"#### -?[\d.,]+\s*$", answer):
        raise UserError(f"{where}: the answer does not end with #### and a number")
    return Question(name, where, text_of(where, row, "question"), (), answer)


def _hellaswag(name: str, where: str, row: dict[str, Any]) -> Question:
    endings, label = row.get("endings"), row.get("label")
    if (
        not isinstance(endings, list)
        or len(endings) != 4
        or not all(isinstance(ending, str) for ending in endings)
    ):
        raise UserError(f"{where}: 'endings' is {endings!r}, where four strings should be")
    if str(label) not in ("0", "1", "2", "3"):
        raise UserError(f"{where}: 'label' is {label!r}, where 0, 1, 2 or 3 should be")
    first, second, activity = (text_of(where, row, key) for key in ("ctx_a", "ctx_b", "activity_label"))
    text = tidy(f"{activity}: {first} {second.capitalize()}")
    return Question(name, where, text, tuple(map(tidy, endings)), int(label))


def tidy(text: str) -> str:
    """HellaSwag's text without the marks of the pages that it was taken from, as everybody who reports it does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


TASKS: dict[str, Callable[[str, Path, int], Benchmark]] = {
    **dict.fromkeys(LAYOUTS, _by_subject),
    "boolq": _single(("val.jsonl", "dev.jsonl"), ("train.jsonl",), _boolq),
    "gsm8k": _single(("test.jsonl",), ("train.jsonl",), _gsm8k),
    "hellaswag": _single(
        ("hellaswag_val.jsonl", "val.jsonl"), ("hellaswag_train.jsonl", "train.jsonl"), _hellaswag
    ),
}
