"""Loaders of benchmark files.

A benchmark is loaded completely or refused: missing, duplicate or malformed rows are errors.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ascendspeed.evaluation.questions import LETTERS, Benchmark, Question, Subject
from ascendspeed.evaluation.readers import csv_rows, json_rows, parquet_objects, parquet_rows, string_field
from ascendspeed.evaluation.subjects import SubjectInfo, custom_subjects
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten, shorten_list

CUSTOM_SUBJECTS = "subjects.csv"
"""CSV file with the header subject,category in the folder of a user-provided dataset in the format of a
benchmark.
"""
SHOWN = 6
"""Names that an error lists."""

Loader = Callable[[Path, int], Benchmark]
"""(folder, number of examples) -> the benchmark with at most that many examples for each subject.

Raises UserError.
"""
ReadSplit = Callable[[str, str], Iterator[Question]]
"""(subject, split) -> its questions."""
ParseRow = Callable[[str, str, dict[str, Any]], Question]
"""(id, file and line, JSON object) -> question. Raises UserError."""


@dataclass(frozen=True)
class SubjectFiles:
    """File names and columns of a benchmark with subjects."""

    scored: str
    """Split with the questions; the examples are in dev."""
    folders: tuple[str, ...]
    """Folders that may contain the splits, relative to the given one."""
    file: str
    """File name, with {subject} and {split}."""
    columns: tuple[str, ...] | None
    """Columns of question, A, B, C, D and answer; None: the CSV files have no header."""
    parquet: tuple[str, ...]
    """Columns in the parquet files of the Hugging Face hub; `choices` may replace A to D."""


def by_subject(task: str, files: SubjectFiles, subjects: dict[str, SubjectInfo]) -> Loader:
    """Returns the loader of a multiple-choice benchmark with one file for each subject and split."""

    def load(folder: Path, num_shots: int) -> Benchmark:
        custom = (folder / CUSTOM_SUBJECTS).is_file()
        expected = _read_custom_subjects(folder / CUSTOM_SUBJECTS) if custom else subjects
        location, names, read = _find_files(task, files, folder)
        _check_subjects(task, location, names, expected)
        loaded = []
        for name, info in expected.items():
            shots = tuple(read(name, "dev"))[:num_shots] if num_shots else ()
            loaded.append(Subject(info, shots, tuple(read(name, files.scored))))
        return Benchmark(task, folder, tuple(loaded), custom)

    return load


def _find_files(task: str, files: SubjectFiles, folder: Path) -> tuple[Path, list[str], ReadSplit]:
    """Returns the folder of the questions, the names of its subjects, and their reader. Raises UserError."""
    roots = [folder / name for name in files.folders if (folder / name / files.scored).is_dir()]
    if roots:
        root = roots[0]
        location = root / files.scored
        pattern = re.escape(files.file.format(subject="@", split=files.scored)).replace("@", "(.+)")
        matches = (re.fullmatch(pattern, path.name) for path in sorted(location.iterdir()))
        names = [match[1] for match in matches if match]
        read = _csv_reader(files, root)
    else:
        location = folder
        names = sorted({path.parent.name for path in folder.glob(f"*/{files.scored}-*.parquet")} - {"all"})
        read = _parquet_reader(files, folder)
        if not names:
            location, names, read = _find_joint_parquet(files, folder)
    if not names:
        raise UserError(f"{folder} has no files of {task}: {_advice(files, folder)}")
    return location, names, read


def _advice(files: SubjectFiles, folder: Path) -> str:
    """Returns what was looked for, or to give the folder above if `folder` is one of its splits."""
    for split in (files.scored, "dev", "val", "test"):
        names_split = folder.name == split or "{split}" in files.file
        if names_split and any(folder.glob(files.file.format(subject="*", split=split))):
            return f"it is the split {split} of them; give the folder above, {folder.parent}"
    file = files.file.format(subject="SUBJECT", split=files.scored)
    return (
        f"looked for {files.scored}/{file} and SUBJECT/{files.scored}-*.parquet or "
        f"all/{files.scored}-*.parquet"
    )


def _find_joint_parquet(files: SubjectFiles, folder: Path) -> tuple[Path, list[str], ReadSplit]:
    """Returns folder, subjects and reader of files with all subjects, named by the column `subject`, as the
    hub's cais/mmlu has them in `all/`."""
    location = next(
        (place for place in (folder / "all", folder) if any(place.glob(f"{files.scored}-*.parquet"))), folder
    )

    @cache
    def by_subject(split: str) -> dict[str, list[tuple[str, list[Any]]]]:
        rows: dict[str, list[tuple[str, list[Any]]]] = defaultdict(list)
        paths = sorted(location.glob(f"{split}-*.parquet"))
        for where, (subject, *cells) in parquet_rows(paths, ("subject", *files.parquet)):
            if not isinstance(subject, str):
                raise UserError(
                    f"{where}: 'subject' is {shorten(subject)}, where the name of a subject should be"
                )
            rows[subject].append((where, cells))
        return rows

    def read(subject: str, split: str) -> Iterator[Question]:
        if subject not in by_subject(split):
            raise UserError(f"{location}: {split}-*.parquet has no questions in {subject}")
        return _questions_of_parquet(f"{subject}/{split}", by_subject(split)[subject])

    return location, sorted(by_subject(files.scored)), read


def _read_custom_subjects(path: Path) -> dict[str, SubjectInfo]:
    rows = [row for _, row in csv_rows(path, ("subject", "category"))]
    counts = Counter(name for name, _ in rows)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"{path} names {', '.join(repeated)} twice")
    if not rows:
        raise UserError(f"{path} names no subject")
    return custom_subjects(dict(rows), str(path))


def _check_subjects(
    task: str, location: Path, names: Sequence[str], expected: dict[str, SubjectInfo]
) -> None:
    missing = [name for name in expected if name not in names]
    unknown = [name for name in names if name not in expected]
    faults = []
    if missing:
        faults.append(f"lacks {shorten_list(missing, SHOWN)}")
    if unknown:
        faults.append(f"has {shorten_list(unknown, SHOWN)}")
    if faults:
        explanation = "which it does not know" if unknown else f"of its {len(expected)} subjects"
        raise UserError(
            f"{location}: {task} {' and '.join(faults)}, {explanation}; a dataset of your own lists its "
            f"subjects in {CUSTOM_SUBJECTS} (subject,category)"
        )


def _csv_reader(files: SubjectFiles, root: Path) -> ReadSplit:
    def read(subject: str, split: str) -> Iterator[Question]:
        path = root / split / files.file.format(subject=subject, split=split)
        for i, (location, row) in enumerate(csv_rows(path, files.columns, width=6)):
            yield _multiple_choice(f"{subject}/{split}/{i}", location, row[0], row[1:5], row[5])

    return read


def _parquet_reader(files: SubjectFiles, folder: Path) -> ReadSplit:
    def read(subject: str, split: str) -> Iterator[Question]:
        paths = sorted((folder / subject).glob(f"{split}-*.parquet"))
        if not paths:
            raise UserError(f"{folder / subject} has no {split}-*.parquet")
        return _questions_of_parquet(f"{subject}/{split}", parquet_rows(paths, files.parquet))

    return read


def _questions_of_parquet(prefix: str, rows: Iterable[tuple[str, list[Any]]]) -> Iterator[Question]:
    """Yields the questions of (file and row, cells), with ids that begin with `prefix`."""
    for i, (location, (text, *choices, answer)) in enumerate(rows):
        choices = choices[0] if len(choices) == 1 else choices
        letter = LETTERS[answer] if isinstance(answer, int) and 0 <= answer < len(LETTERS) else answer
        yield _multiple_choice(f"{prefix}/{i}", location, text, choices, letter)


def _multiple_choice(name: str, location: str, text: Any, choices: Any, answer: Any) -> Question:
    """Returns a question with four choices. Raises UserError."""
    if (
        not isinstance(choices, list)
        or len(choices) != 4
        or not all(isinstance(x, str) for x in (text, *choices))
    ):
        raise UserError(
            f"{location}: expected a question and four choices as text, not {shorten(text)}, "
            f"{shorten(choices)}"
        )
    if answer not in tuple(LETTERS):
        raise UserError(f"{location}: the answer {shorten(answer)} is not one of A, B, C, D")
    return Question(name, location, text, tuple(choices), LETTERS.index(answer))


def json_lines(task: str, scored: Sequence[str], examples: Sequence[str], parse: ParseRow) -> Loader:
    """Returns the loader of a benchmark without subjects: JSON lines or parquet of questions and of examples.

    `scored` and `examples`: possible names of the two: a file of JSON lines (`val.jsonl`), or how the names
    of parquet files begin (`main/test` for `main/test-00000-of-00001.parquet`); exactly one of each must be
    in the folder.
    """

    def load(folder: Path, num_shots: int) -> Benchmark:
        questions = _read_split(_only_split(task, folder, scored), f"{task}/scored", parse)
        shots: tuple[Question, ...] = ()
        if num_shots:
            shots = _read_split(_only_split(task, folder, examples), f"{task}/train", parse, num_shots)
        return Benchmark(task, folder, (Subject(SubjectInfo(task, task, task), shots, questions),))

    return load


def _read_split(
    paths: Sequence[Path], prefix: str, parse: ParseRow, limit: int | None = None
) -> tuple[Question, ...]:
    rows = parquet_objects(paths) if paths[0].suffix == ".parquet" else json_rows(paths[0])
    questions: list[Question] = []
    for i, (location, row) in enumerate(rows):
        if i == limit:
            break
        questions.append(parse(f"{prefix}/{i}", location, row))
    return tuple(questions)


def _split_files(folder: Path, name: str) -> list[Path]:
    """Returns the files of a split by its name in `json_lines`."""
    if name.endswith(".jsonl"):
        return [folder / name] if (folder / name).is_file() else []
    return sorted(folder.glob(f"{name}-*.parquet"))


def _only_split(task: str, folder: Path, names: Iterable[str]) -> list[Path]:
    present = [(name, paths) for name in names if (paths := _split_files(folder, name))]
    if not present:
        looked_for = [name if name.endswith(".jsonl") else f"{name}-*.parquet" for name in names]
        raise UserError(f"{folder}: {task} lacks {' or '.join(looked_for)}")
    if len(present) > 1:
        first_files = [str(paths[0].relative_to(folder)) for _, paths in present]
        raise UserError(f"{folder}: {task} has both {' and '.join(first_files)}: remove one of them")
    [(_, paths)] = present
    return paths


def parse_boolq(name: str, location: str, row: dict[str, Any]) -> Question:
    """Parses a row of BoolQ: `label` in SuperGLUE, `answer` in the original files."""
    answer = row.get("label", row.get("answer"))
    if type(answer) not in (bool, int) or answer not in (0, 1):
        raise UserError(f"{location}: 'label' is {shorten(answer)}, where true or false (1 or 0) should be")
    text = string_field(location, row, "question")
    passage = string_field(location, row, "passage")
    return Question(name, location, text, ("no", "yes"), int(answer), passage)


def parse_gsm8k(name: str, location: str, row: dict[str, Any]) -> Question:
    """Parses a row of GSM8K, whose answer ends with #### and a number."""
    answer = string_field(location, row, "answer")
    if not re.search(r"#### -?\$?[\d.,]+\s*$", answer):
        raise UserError(f"{location}: the answer does not end with #### and a number")
    return Question(name, location, string_field(location, row, "question"), (), answer)


def parse_hellaswag(name: str, location: str, row: dict[str, Any]) -> Question:
    """Parses a row of HellaSwag: a context and four endings."""
    endings, label = row.get("endings"), row.get("label")
    if (
        not isinstance(endings, list)
        or len(endings) != 4
        or not all(isinstance(ending, str) for ending in endings)
    ):
        raise UserError(f"{location}: 'endings' is {shorten(endings)}, where four strings should be")
    if str(label) not in ("0", "1", "2", "3"):
        raise UserError(f"{location}: 'label' is {shorten(label)}, where 0, 1, 2 or 3 should be")
    keys = ("ctx_a", "ctx_b", "activity_label")
    first, second, activity = (string_field(location, row, key) for key in keys)
    text = clean_wikihow(f"{activity}: {first} {second.capitalize()}")
    return Question(name, location, text, tuple(map(clean_wikihow, endings)), int(label))


def clean_wikihow(text: str) -> str:
    """Removes the markup of WikiHow pages from a text of HellaSwag, as in lm-evaluation-harness."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
