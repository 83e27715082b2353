"""Aggregates the grades of questions into means by subject, by category and over all."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from ascendspeed.evaluation.lm_eval import Grade
from ascendspeed.evaluation.questions import Benchmark
from ascendspeed.evaluation.tasks import TASKS


@dataclass(frozen=True)
class SubjectScore:
    """Mean metrics of a subject, as shares of 1."""

    questions: int
    metrics: dict[str, float]
    """Means over the questions."""


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task."""

    benchmark: Benchmark
    metric: str
    """The main metric."""
    subjects: dict[str, SubjectScore]
    groups: dict[str, dict[str, Any]]
    """Category, further group, or `all` -> macro and micro means of the main metric."""
    dropped: int
    """Examples that did not fit before their question."""
    shortened: int
    """Questions with fewer examples than requested."""
    truncated: int
    """Questions that did not fit even without examples and lost their beginning."""

    @property
    def is_share(self) -> bool:
        """True if the main metric is a share of 1, to be shown in percent."""
        return all(0 <= subject.metrics[self.metric] <= 1 for subject in self.subjects.values())


def score_task(benchmark: Benchmark, grades: Sequence[Grade], num_shots: int) -> TaskScore:
    """Aggregates the grades of all questions of one task."""
    by_subject: dict[str, list[Grade]] = defaultdict(list)
    for grade in grades:
        by_subject[grade.prompt.subject].append(grade)
    subjects = {name: _mean(subject_grades) for name, subject_grades in by_subject.items()}
    expected = {subject.info.name: len(subject.questions) for subject in benchmark.subjects}
    assert expected == {name: score.questions for name, score in subjects.items()}
    metric = TASKS[benchmark.name].main_metric
    missing_shots = [num_shots - grade.prompt.num_shots for grade in grades]
    return TaskScore(
        benchmark=benchmark,
        metric=metric,
        subjects=subjects,
        groups=_groups(benchmark, subjects, metric),
        dropped=sum(missing_shots),
        shortened=sum(map(bool, missing_shots)),
        truncated=sum(bool(grade.prompt.truncated) for grade in grades),
    )


def _groups(
    benchmark: Benchmark, subjects: dict[str, SubjectScore], metric: str
) -> dict[str, dict[str, Any]]:
    """Returns the means of every group of subjects and of all; only of all if there is one subject."""
    groups = {}
    if len(subjects) > 1:
        members: dict[str, list[SubjectScore]] = defaultdict(list)
        for subject in benchmark.subjects:
            for group in (subject.info.category, *subject.info.extra_groups):
                members[group].append(subjects[subject.info.name])
        groups = {name: group_means(scores, metric) for name, scores in members.items()}
    groups["all"] = group_means(list(subjects.values()), metric)
    return groups


def _mean(grades: Sequence[Grade]) -> SubjectScore:
    names = grades[0].metrics
    means = {name: sum(grade.metrics[name] for grade in grades) / len(grades) for name in names}
    return SubjectScore(len(grades), means)


def group_means(scores: Sequence[SubjectScore], metric: str) -> dict[str, Any]:
    """Means of a group. macro: over subjects, as in OpenCompass; micro: over questions, as in Hendrycks et
    al. and lm-eval.
    """
    questions = sum(score.questions for score in scores)
    micro = sum(score.metrics[metric] * score.questions for score in scores) / questions
    macro = sum(score.metrics[metric] for score in scores) / len(scores)
    is_share = questions > 1 and 0 <= micro <= 1
    stderr = sqrt(micro * (1 - micro) / (questions - 1)) if is_share else None
    return {
        "subjects": len(scores),
        "questions": questions,
        "macro": macro,
        "micro": micro,
        "micro_stderr": stderr,
    }
