"""Reports of an evaluation: a table, results.json, results.csv, chart.png, and grades in questions.jsonl."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed.evaluation.answer_cache import FILE_NAME, AnswerRecord
from ascendspeed.evaluation.chart import draw_chart
from ascendspeed.evaluation.lm_eval import Grade
from ascendspeed.evaluation.metrics import TaskScore
from ascendspeed.utils.atomic import write_file


def as_text(score: TaskScore, title: str) -> str:
    """Returns a table with a line for each subject, each category, and all."""
    custom = ", a dataset of your own" if score.benchmark.custom else ""
    factor, unit = (100, " in %") if score.is_share else (1, "")
    lines = [f"{score.benchmark.name} ({score.benchmark.folder}{custom}), {title}, {score.metric}{unit}"]
    width = max(len(name) for name in (*score.subjects, *score.groups, "category"))
    if len(score.subjects) > 1:
        lines.append(f"  {'subject':{width}}  questions  {score.metric:>8}")
        for name, subject in score.subjects.items():
            value = factor * subject.metrics[score.metric]
            lines.append(f"  {name:{width}}  {subject.questions:9}  {value:8.2f}")
    lines.append(f"  {'category':{width}}  questions  {'macro':>8}  {'micro':>8}")
    for name, means in score.groups.items():
        has_stderr = name == "all" and means["micro_stderr"] is not None
        stderr = f"  ± {factor * means['micro_stderr']:.2f}" if has_stderr else ""
        macro, micro = factor * means["macro"], factor * means["micro"]
        lines.append(f"  {name:{width}}  {means['questions']:9}  {macro:8.2f}  {micro:8.2f}{stderr}")
    for name, value in _other_metrics(score).items():
        lines.append(f"  {name}: {factor * value:.2f}")
    if score.shortened:
        lines.append(
            f"  {score.dropped} examples did not fit before {score.shortened} questions and were dropped"
        )
    if score.truncated:
        lines.append(
            f"  {score.truncated} questions did not fit even without examples, and lost their beginning"
        )
    return "\n".join(lines)


def _other_metrics(score: TaskScore) -> dict[str, float]:
    """Returns the micro means of all metrics but the main one."""
    subjects = list(score.subjects.values())
    names = [
        name
        for name in subjects[0].metrics
        if name != score.metric and all(name in subject.metrics for subject in subjects)
    ]
    total = sum(subject.questions for subject in subjects)
    return {
        name: sum(subject.metrics[name] * subject.questions for subject in subjects) / total for name in names
    }


def as_json(score: TaskScore, num_shots: int) -> dict[str, Any]:
    """Returns the entry of a task in results.json."""
    return {
        "data": str(score.benchmark.folder),
        "own_set": score.benchmark.custom,
        "num_fewshot": num_shots,
        "metric": score.metric,
        **score.groups["all"],
        "other_metrics": _other_metrics(score),
        "categories": {name: means for name, means in score.groups.items() if name != "all"},
        "by_subject": {
            name: {"questions": subject.questions, **subject.metrics}
            for name, subject in score.subjects.items()
        },
        "examples_dropped": score.dropped,
        "questions_with_fewer_examples": score.shortened,
        "questions_cut": score.truncated,
    }


def as_csv(scores: Sequence[TaskScore]) -> str:
    """Returns a CSV table with a line for each subject and metric, and for the means."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("task", "category", "subject", "questions", "metric", "value"))
    for score in scores:
        task = score.benchmark.name
        categories = {subject.info.name: subject.info.category for subject in score.benchmark.subjects}
        for name, subject in score.subjects.items():
            for metric, value in subject.metrics.items():
                writer.writerow((task, categories[name], name, subject.questions, metric, value))
        for group, means in score.groups.items():
            for kind in ("macro", "micro"):
                writer.writerow((task, group, "", means["questions"], f"{score.metric} {kind}", means[kind]))
    return text.getvalue()


def _readable(grade: Grade) -> dict[str, Any]:
    """Returns what a person needs to judge an answer: question, prompt, prediction and the right answer."""
    prompt, question = grade.prompt, grade.prompt.question
    right = prompt.choices[question.answer] if prompt.choices else question.answer
    choices = {"choices": list(prompt.choices)} if prompt.choices else {}
    texts = {"question": question.text, "prompt": prompt.context}
    return texts | choices | {"predicted": grade.predicted, "right": right}


def write_reports(
    folder: Path,
    scores: Sequence[TaskScore],
    run: AnswerRecord,
    grades: Sequence[Grade],
    records: dict[str, AnswerRecord],
    harness: Mapping[str, AnswerRecord] | None = None,
) -> None:
    """Writes all files; questions.jsonl is rewritten with the grades, in the order of the benchmarks' files.

    `run`: description of the run, with the number of examples of each task under `shots`. `harness`: key of
    an answer to a task of lm-evaluation-harness -> the right answer and the metrics.
    """
    harness = harness or {}
    limit = f", only the first {run['limit']} of each subject (--limit)" if run["limit"] else ""
    title = f"{run['model']['path']}, {run['settings']['prompt_style']} prompts{limit}"
    tasks = {score.benchmark.name: as_json(score, run["shots"][score.benchmark.name]) for score in scores}
    results = {name: value for name, value in run.items() if name != "shots"} | {"tasks": tasks}
    write_file(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_file(folder / "results.csv", as_csv(scores))
    if shares := [score for score in scores if score.is_share]:
        write_file(folder / "chart.png", draw_chart(shares, title))
    graded_keys = {*(grade.key for grade in grades), *harness}
    graded = [records[grade.key] | _readable(grade) | {"metrics": grade.metrics} for grade in grades]
    graded += [records[key] | more for key, more in harness.items()]
    others = [record for key, record in records.items() if key not in graded_keys]
    lines = [{"settings": run["settings"]}, *others, *graded]
    write_file(folder / FILE_NAME, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
