"""Charts of the evaluation and of the needle test: values, labels and legends of the drawn objects."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ascendspeed.evaluation import chart, metrics, report
from ascendspeed.evaluation.metrics import SubjectScore, TaskScore
from ascendspeed.evaluation.questions import Benchmark, Question, Subject
from ascendspeed.evaluation.subjects import SubjectInfo


def task_score(name: str, shares: dict[str, float], count: int, choices: tuple[str, ...]) -> TaskScore:
    """A task with a subject for each share, in categories of two."""
    infos = [SubjectInfo(subject, f"category {i // 2}", subject) for i, subject in enumerate(shares)]
    questions = tuple(Question(str(i), "", "", choices, 0) for i in range(count))
    benchmark = Benchmark(name, Path("x"), tuple(Subject(info, (), questions) for info in infos))
    scores = {subject: SubjectScore(count, {"acc": share}) for subject, share in shares.items()}
    return TaskScore(benchmark, "acc", scores, metrics._groups(benchmark, scores, "acc"), 0, 0, 0)


def drawn(score: TaskScore):
    """The axes of a task and the texts of its legend."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    chart._draw_task(axes, score)
    figure.canvas.draw()
    return axes, [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_task_with_subjects():
    shares = {"anatomy": 0.5, "law": 0.25, "logic": 1.0}
    axes, legend = drawn(task_score("mmlu", shares, 100, tuple("abcd")))
    assert [text.get_text() for text in axes.texts] == ["50.0", "25.0", "100.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(shares)
    assert legend == ["category 0", "category 1", "macro mean 58.3", "chance 25", "95 % interval"]
    assert "mmlu: macro 58.33, micro 58.33 (300 questions)" in axes.get_title()
    assert [bar.get_width() for bar in axes.patches] == [50, 25, 100]
    below = axes.get_legend().get_window_extent().y0
    assert below >= axes.get_window_extent().y1  # the legend is above the bars


def test_a_task_without_subjects():
    axes, legend = drawn(task_score("boolq", {"boolq": 0.6}, 1, ("no", "yes")))
    assert legend == ["chance 50", "95 % interval"]
    assert axes.get_title() == "boolq: 60.00 (1 question)"
    low, high = sorted(axes.get_ylim())
    assert axes.patches[0].get_height() < 0.5 * (high - low)  # not as wide as the page
    _, legend = drawn(task_score("gsm8k", {"gsm8k": 0.6}, 9, ()))
    assert legend == ["95 % interval"]  # no chance level where answers are generated


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        (0.5, 100, (0.4038, 0.5962)),
        (0.0, 10, (0.0, 0.2775)),
        (1.0, 1, (0.2065, 1.0)),
        (0.2, 5, (0.0362, 0.6245)),
    ],
)
def test_intervals(share, count, expected):
    """Values of Wilson's formula, by hand."""
    assert chart.wilson_interval(share, count) == pytest.approx(expected, abs=1e-4)


def test_a_single_question_has_no_standard_error():
    one, two = (task_score("boolq", {"boolq": 1.0}, count, ("no", "yes")) for count in (1, 2))
    assert one.groups["all"]["micro_stderr"] is None
    assert "±" not in report.as_text(one, "x")
    assert "± 0.00" in report.as_text(two, "x")


def test_the_title_names_the_limit(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(report, "draw_chart", lambda scores, title: titles.append(title) or b"")
    score = task_score("boolq", {"boolq": 1.0}, 1, ("no", "yes"))
    for limit in (None, 2):
        run = {"model": {"path": "W"}, "settings": {"prompt_style": "lm-eval"}, "shots": {"boolq": 0}}
        report.write_reports(tmp_path, [score], run | {"limit": limit}, [], {})
    assert titles == ["W, lm-eval prompts", "W, lm-eval prompts, only the first 2 of each subject (--limit)"]


def test_needle_chart(monkeypatch):
    figures = []
    monkeypatch.setattr(chart, "_png", lambda figure: figures.append(figure) or b"")
    chart.draw_needle_chart([100, 200], [0, 50], [[1, 0.5], [0, 0.25]], "Needle in a haystack: W")
    axes, bar = figures[0].axes
    assert figures[0].get_suptitle() == "Needle in a haystack: W"
    assert [text.get_text() for text in axes.texts] == ["100", "50", "0", "25"]
    assert (bar.get_ylabel(), axes.get_xlabel()) == ("found (%)", "length of the prompt (tokens)")
