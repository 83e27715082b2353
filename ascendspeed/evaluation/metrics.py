"""Grades of single questions -> means by subject, by category and of all."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from ascendspeed.evaluation.lm_eval import Grade, main_metric
from ascendspeed.evaluation.questions import Benchmark


@dataclass(frozen=True)
class Figures:
    """Of some questions; shares are of 1."""

    questions: int
    metrics: dict[str, float]
    """Mean over the questions."""


@dataclass(frozen=True)
class Result:
    """Of one task."""

    benchmark: Benchmark
    metric: str
    """The one that is quoted."""
    subjects: dict[str, Figures]
    groups: dict[str, dict[str, Any]]
    """Category, further sets of subjects, and `all` -> macro and micro means of the quoted metric."""
    dropped: int
    """Examples that did not fit before their question."""
    shortened: int
    """Questions with fewer examples than asked for."""
    cut: int
    """Questions that did not even fit alone, and lost their beginning."""


def of(benchmark: Benchmark, grades: Sequence[Grade], shots: int) -> Result:
    """Grades of one task, all of its questions."""
    by_subject: dict[str, list[Grade]] = defaultdict(list)
    for grade in grades:
        by_subject[grade.prompt.subject].append(grade)
    subjects = {name: _mean(of_one) for name, of_one in by_subject.items()}
    assert {s.topic.name: len(s.questions) for s in benchmark.subjects} == {
        n: f.questions for n, f in subjects.items()
    }
    metric = main_metric(benchmark.name)
    members: dict[str, list[Figures]] = defaultdict(list)
    for subject in benchmark.subjects:
        for group in (subject.topic.category, *subject.topic.sets):
            members[group].append(subjects[subject.topic.name])
    groups = {} if len(subjects) == 1 else {name: _means(some, metric) for name, some in members.items()}
    groups["all"] = _means(list(subjects.values()), metric)
    missing = [shots - grade.prompt.shots for grade in grades]
    return Result(
        benchmark,
        metric,
        subjects,
        groups,
        sum(missing),
        sum(map(bool, missing)),
        sum(bool(g.prompt.cut) for g in grades),
    )


def _mean(grades: Sequence[Grade]) -> Figures:
    metrics = {name: sum(g.metrics[name] for g in grades) / len(grades) for name in grades[0].metrics}
    return Figures(len(grades), metrics)


def _means(some: Sequence[Figures], metric: str) -> dict[str, Any]:
    """macro: mean of the subjects, as OpenCompass reports it; micro: mean of the questions, as Hendrycks and lm-eval do."""
    questions = sum(figures.questions for figures in some)
    micro = sum(figures.metrics[metric] * figures.questions for figures in some) / questions
    macro = sum(figures.metrics[metric] for figures in some) / len(some)
    error = sqrt(micro * (1 - micro) / (questions - 1)) if questions > 1 else 0.0
    return {
        "subjects": len(some),
        "questions": questions,
        "macro": macro,
        "micro": micro,
        "micro_stderr": error,
    }
