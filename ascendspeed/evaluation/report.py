"""What an evaluation leaves: a table on the screen, results.json, results.csv, chart.png, and the grades in questions.jsonl."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascendspeed.evaluation.answer_cache import NAME, Record
from ascendspeed.evaluation.lm_eval import Grade
from ascendspeed.evaluation.metrics import Result
from ascendspeed.utils.atomic import write_file

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")


def text(result: Result, title: str) -> str:
    """A table: a line for each subject, each category, and all."""
    own = ", a set of your own" if result.benchmark.own else ""
    lines = [f"{result.benchmark.name} ({result.benchmark.folder}{own}), {title}, {result.metric} in %"]
    width = max(len(name) for name in (*result.subjects, *result.groups, "category"))
    if len(result.subjects) > 1:
        lines.append(f"  {'subject':{width}}  questions  {result.metric:>8}")
        for name, figures in result.subjects.items():
            lines.append(
                f"  {name:{width}}  {figures.questions:9}  {100 * figures.metrics[result.metric]:8.2f}"
            )
    lines.append(f"  {'category':{width}}  questions  {'macro':>8}  {'micro':>8}")
    for name, means in result.groups.items():
        error = f"  ± {100 * means['micro_stderr']:.2f}" if name == "all" else ""
        lines.append(
            f"  {name:{width}}  {means['questions']:9}  {100 * means['macro']:8.2f}  {100 * means['micro']:8.2f}{error}"
        )
    for name, value in _other_metrics(result).items():
        lines.append(f"  {name}: {100 * value:.2f}")
    if result.shortened:
        lines.append(
            f"  {result.dropped} examples did not fit before {result.shortened} questions and were dropped"
        )
    if result.cut:
        lines.append(f"  {result.cut} questions did not fit even alone, and lost their beginning")
    return "\n".join(lines)


def _other_metrics(result: Result) -> dict[str, float]:
    subjects = list(result.subjects.values())
    names = [name for name in subjects[0].metrics if name != result.metric]
    total = sum(figures.questions for figures in subjects)
    return {
        name: sum(figures.metrics[name] * figures.questions for figures in subjects) / total for name in names
    }


def as_json(result: Result, shots: int) -> dict[str, Any]:
    """Of one task, for results.json."""
    return {
        "data": str(result.benchmark.folder),
        "own_set": result.benchmark.own,
        "num_fewshot": shots,
        "metric": result.metric,
        **result.groups["all"],
        "other_metrics": _other_metrics(result),
        "categories": {name: means for name, means in result.groups.items() if name != "all"},
        "by_subject": {name: {"questions": f.questions, **f.metrics} for name, f in result.subjects.items()},
        "examples_dropped": result.dropped,
        "questions_with_fewer_examples": result.shortened,
        "questions_cut": result.cut,
    }


def as_csv(results: Sequence[Result]) -> str:
    """A line for each subject and metric, and for the means."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("task", "category", "subject", "questions", "metric", "value"))
    for result in results:
        name = result.benchmark.name
        topics = {subject.topic.name: subject.topic for subject in result.benchmark.subjects}
        for subject, figures in result.subjects.items():
            for metric, value in figures.metrics.items():
                writer.writerow((name, topics[subject].category, subject, figures.questions, metric, value))
        for group, means in result.groups.items():
            for kind in ("macro", "micro"):
                writer.writerow((name, group, "", means["questions"], f"{result.metric} {kind}", means[kind]))
    return out.getvalue()


def chart(results: Sequence[Result], title: str) -> bytes:
    """A PNG: a bar for each subject in the colour of its category, a line at the mean of them; a row for each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widest = max(len(result.subjects) for result in results)
    figure = Figure(
        figsize=(max(6.0, 0.24 * widest + 2), 3.6 * len(results) + 0.4), dpi=110, layout="constrained"
    )
    for axes, result in zip(figure.subplots(len(results), 1, squeeze=False)[:, 0], results, strict=True):
        _bars(axes, result)
    figure.suptitle(title, fontsize=9)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()


def _bars(axes: Any, result: Result) -> None:
    subjects = sorted(result.benchmark.subjects, key=lambda subject: subject.topic.category)
    categories = list(dict.fromkeys(subject.topic.category for subject in subjects))
    for number, category in enumerate(categories):
        places = [i for i, subject in enumerate(subjects) if subject.topic.category == category]
        heights = [100 * result.subjects[subjects[i].topic.name].metrics[result.metric] for i in places]
        axes.bar(places, heights, color=COLORS[number % len(COLORS)], label=category)
    macro, micro = (100 * result.groups["all"][kind] for kind in ("macro", "micro"))
    axes.axhline(macro, color="black", lw=0.8, ls="--")
    axes.set_title(f"{result.benchmark.name}: macro {macro:.2f}, micro {micro:.2f}", fontsize=9)
    names = [_fitting(subject.topic.name) for subject in subjects]
    axes.set_xticks(range(len(subjects)), names, rotation=90 if len(names) > 1 else 0, fontsize=6)
    axes.margins(x=0.01)
    axes.set(ylim=(0, 100), ylabel=f"{result.metric} (%)")
    if len(categories) > 1:
        axes.legend(fontsize=7, ncols=len(categories), loc="upper right")


def _fitting(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def write(
    folder: Path, results: Sequence[Result], about: Record, grades: Sequence[Grade], known: dict[str, Record]
) -> None:
    """Everything into the folder; questions.jsonl again, with the grades, in the order of the benchmarks' files."""
    title = f"{about['model']['path']}, {about['settings']['prompt_style']} prompts"
    tasks = {
        result.benchmark.name: as_json(result, about["shots"][result.benchmark.name]) for result in results
    }
    whole = {name: value for name, value in about.items() if name != "shots"} | {"tasks": tasks}
    write_file(folder / "results.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    write_file(folder / "results.csv", as_csv(results))
    write_file(folder / "chart.png", chart(results, title))
    graded = [known[grade.key] | {"metrics": grade.metrics} for grade in grades]
    others = [record for key, record in known.items() if key not in {grade.key for grade in grades}]
    lines = [{"settings": about["settings"]}, *others, *graded]
    write_file(folder / NAME, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
