"""Scores of lm-evaluation-harness' own tasks, in the form of this project's reports."""

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

from ascendspeed.evaluation.harness_model import RequestModel
from ascendspeed.evaluation.metrics import SubjectScore, TaskScore, group_means
from ascendspeed.evaluation.questions import Benchmark, Subject
from ascendspeed.evaluation.subjects import SubjectInfo
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

PREFERRED_METRICS = ("acc_norm", "exact_match", "acc", "f1", "score")
"""Metrics that are reported first, the most quoted one first; else the first one of the task."""


@dataclass(frozen=True)
class HarnessResult:
    """Score of a task, group or tag, and its graded answers."""

    score: TaskScore
    records: dict[str, dict[str, Any]]
    """Key of an answer -> what questions.jsonl adds to it."""
    shots: int | str
    """Examples before each question; "mixed" if the tasks differ."""
    chat_template: str | None
    """Name of the chat template; None: plain text."""


def evaluate_tasks(
    title: str,
    folder: Path,
    tasks: Mapping[str, Task],
    model: RequestModel,
    *,
    limit: int | None,
    system: str | None,
    multiturn: bool,
) -> HarnessResult:
    """Answers and grades the tasks of one --task, named `title` in the reports.

    Raises UserError for answers that a task cannot grade.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each task
            results = evaluate(
                model,
                {"tasks": dict(tasks), "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=system,
                apply_chat_template=model.chat is not None,
                fewshot_as_multiturn=multiturn,
            )
    except (KeyError, ValueError, TypeError, ImportError, LookupError) as error:
        raise UserError(f"--task {title} with {folder}: {first_line(error)}") from error
    subjects = {
        task: SubjectScore(results["n-samples"][task]["effective"], _metrics(results["results"][task]))
        for task in tasks
    }
    metric = _main_metric(subjects)
    infos = [SubjectInfo(task, title, task) for task in tasks]
    score = TaskScore(
        benchmark=Benchmark(title, folder, tuple(Subject(info, (), ()) for info in infos)),
        metric=metric,
        subjects=subjects,
        groups={"all": group_means(list(subjects.values()), metric)},
        dropped=0,
        shortened=0,
        truncated=0,
    )
    shots = {task.get_config("num_fewshot") for task in tasks.values()}
    return HarnessResult(
        score,
        _graded(tasks, model, results["samples"]),
        shots.pop() if len(shots) == 1 else "mixed",
        model.chat.name if model.chat else None,
    )


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a task by name, with the name of their filter if there is more than one."""
    values = {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    names = [key.partition(",")[0] for key in values]
    return {
        key if names.count(key.partition(",")[0]) > 1 else key.partition(",")[0]: value
        for key, value in values.items()
    }


def _main_metric(subjects: Mapping[str, SubjectScore]) -> str:
    """Returns the metric to report first, of those that every task has. Raises UserError if there is none."""
    first, *others = subjects.values()
    common = [name for name in first.metrics if all(name in other.metrics for other in others)]
    if not common:
        raise UserError(f"the tasks {', '.join(subjects)} share no metric; give them one by one")
    for preferred in PREFERRED_METRICS:
        for name in common:
            if name.partition(",")[0] == preferred:
                return name
    return common[0]


def _graded(
    tasks: Mapping[str, Task], model: RequestModel, samples: Mapping[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Returns key of an answer -> right answer and metrics of its question."""
    records: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        metrics: dict[int, dict[str, Any]] = defaultdict(dict)
        targets = {}
        for sample in samples[name]:
            targets[sample["doc_id"]] = str(sample["target"])
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):
                    metrics[sample["doc_id"]][f"{metric},{sample['filter']}"] = float(sample[metric])
        for request in task.instances:
            more = {"right": targets[request.doc_id], "metrics": metrics[request.doc_id]}
            records[model.key(request)] = more
    return records
