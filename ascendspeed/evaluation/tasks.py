"""Registry of evaluation tasks: one entry with the files, prompts and metrics of a benchmark.

A new task is a constant and one line in `TASKS`; `--task`, the loader, the metrics and the reports take it
from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ascendspeed.evaluation import loaders, prompt_styles
from ascendspeed.evaluation.harness_index import CODE_TASKS, GROUPS, PREFIX
from ascendspeed.evaluation.loaders import Loader, SubjectFiles
from ascendspeed.evaluation.prompt_styles import PromptStyle
from ascendspeed.evaluation.questions import LETTERS, Benchmark
from ascendspeed.evaluation.subjects import SUBJECTS
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class EvaluationTask:
    """Files, prompts and metrics of a benchmark."""

    name: str
    """Value of --task."""
    load: Loader
    styles: Mapping[str, PromptStyle]
    """--prompt-style -> prompts."""
    num_shots: int = 0
    """Default of --num-fewshot."""
    metrics: tuple[str, ...] = ("acc",)
    """Metrics of lm-evaluation-harness for a task with choices."""
    extractions: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Metrics of a task with generated answers: name -> arguments of lm-evaluation-harness' regex filter."""
    main_metric: str = "acc"
    """Metric that is reported first."""
    min_new_tokens: int = 1
    """Smallest sensible --max-new-tokens."""


MMLU = EvaluationTask(
    name="mmlu",
    load=loaders.by_subject(
        "mmlu",
        SubjectFiles(
            scored="test",
            folders=("", "data"),
            file="{subject}_{split}.csv",
            columns=None,
            parquet=("question", "choices", "answer"),
        ),
        SUBJECTS["mmlu"],
    ),
    styles={
        "lm-eval": prompt_styles.harness_choice(
            "The following are multiple choice questions (with answers) about {}.\n\n", "Answer:"
        ),
        "opencompass": PromptStyle(prompt_styles.opencompass_mmlu_context, prompt_styles.letters),
        "hendrycks": PromptStyle(prompt_styles.hendrycks_context, prompt_styles.letters),
    },
    num_shots=5,
)
CEVAL = EvaluationTask(
    name="ceval",
    load=loaders.by_subject(
        "ceval",
        SubjectFiles(
            scored="val",
            folders=("", "formal_ceval"),
            file="{subject}_{split}.csv",
            columns=("question", *LETTERS, "answer"),
            parquet=("question", *LETTERS, "answer"),
        ),
        SUBJECTS["ceval"],
    ),
    styles={
        "lm-eval": prompt_styles.harness_choice(
            "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n", "答案："
        ),
        "opencompass": prompt_styles.opencompass_choice(
            "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n", "\n答案: ", "\n"
        ),
    },
    num_shots=5,
)
CMMLU = EvaluationTask(
    name="cmmlu",
    load=loaders.by_subject(
        "cmmlu",
        SubjectFiles(
            scored="test",
            folders=("", "data"),
            file="{subject}.csv",
            columns=("Question", *LETTERS, "Answer"),
            parquet=("Question", *LETTERS, "Answer"),
        ),
        SUBJECTS["cmmlu"],
    ),
    styles={
        "lm-eval": prompt_styles.harness_choice(
            "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "答案："
        ),
        "opencompass": prompt_styles.opencompass_choice(
            "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n题目：", "\n答案是:", " "
        ),
    },
    num_shots=5,
)
BOOLQ = EvaluationTask(
    name="boolq",
    load=loaders.json_lines(
        "boolq",
        ("val.jsonl", "dev.jsonl", "validation", "data/validation", "boolq/validation"),
        ("train.jsonl", "train", "data/train", "boolq/train"),
        loaders.parse_boolq,
    ),
    styles={
        "lm-eval": PromptStyle(
            prompt_styles.harness_context(
                "", lambda q: f"{q.passage}\nQuestion: {q.text}?\nAnswer:", prompt_styles.right_text
            ),
            prompt_styles.texts,
        ),
        "opencompass": PromptStyle(
            lambda subject, shots, q: f"{q.passage}\nQuestion: {q.text}?",
            lambda q: ("No", "Yes"),
            "\n",
            num_shots=0,
        ),
    },
)
GSM8K = EvaluationTask(
    name="gsm8k",
    load=loaders.json_lines(
        "gsm8k",
        ("test.jsonl", "test", "main/test"),
        ("train.jsonl", "train", "main/train"),
        loaders.parse_gsm8k,
    ),
    styles={
        "lm-eval": PromptStyle(
            prompt_styles.harness_context("", lambda q: f"Question: {q.text}\nAnswer:", lambda q: q.answer),
            lambda q: (),
            until=("Question:", "</s>", "<|im_end|>"),
        ),
    },
    num_shots=5,
    extractions={  # the number after ####, or the last number of all
        "strict-match": {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
        "flexible-extract": {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
    },
    main_metric="flexible-extract",
    min_new_tokens=16,  # the published --max-new-tokens 2 is enough for a letter only
)
HELLASWAG = EvaluationTask(
    name="hellaswag",
    load=loaders.json_lines(
        "hellaswag",
        ("hellaswag_val.jsonl", "val.jsonl", "validation", "data/validation"),
        ("hellaswag_train.jsonl", "train.jsonl", "train", "data/train"),
        loaders.parse_hellaswag,
    ),
    styles={
        "lm-eval": PromptStyle(
            prompt_styles.harness_context("", lambda q: q.text, prompt_styles.right_text), prompt_styles.texts
        ),
    },
    metrics=("acc", "acc_norm"),
    main_metric="acc_norm",
)

TASKS: dict[str, EvaluationTask] = {task.name: task for task in (MMLU, CEVAL, CMMLU, BOOLQ, GSM8K, HELLASWAG)}


def find_task(name: str) -> EvaluationTask:
    """Returns the task of this name. Raises UserError with the known ones."""
    if name not in TASKS:
        raise UserError(
            f"--task {name} does not exist; choose from {', '.join((*TASKS, *GROUPS, *CODE_TASKS))}, or "
            f"{PREFIX}NAME for a task of lm-evaluation-harness"
        )
    return TASKS[name]


def load_benchmark(task: str, folder: str | Path, num_shots: int, limit: int | None = None) -> Benchmark:
    """Loads a benchmark with `num_shots` examples and at most `limit` questions for each subject.

    Raises UserError with file and line.
    """
    folder = Path(folder)
    load = find_task(task).load
    if not folder.is_dir():
        advice = f"; give its folder, {folder.parent}" if folder.is_file() else ""
        raise UserError(f"--task-data-path {folder} of {task} is not a directory{advice}")
    benchmark = load(folder, num_shots)
    for subject in benchmark.subjects:
        if not subject.questions:
            raise UserError(f"{folder}: {task} has no questions in {subject.info.name}")
        if len(subject.shots) < num_shots:
            raise UserError(
                f"{folder}: {task} has {len(subject.shots)} examples for {subject.info.name}, fewer than "
                f"--num-fewshot {num_shots}"
            )
    if limit is None:
        return benchmark
    subjects = (replace(subject, questions=subject.questions[:limit]) for subject in benchmark.subjects)
    return replace(benchmark, subjects=tuple(subjects))


def find_style(name: str, task: str, num_shots: int) -> PromptStyle:
    """Returns the prompts of a task in a style. Raises UserError if the style does not define them."""
    styles = find_task(task).styles
    if name not in styles:
        raise UserError(f"--prompt-style {name} has no prompts for {task}; choose {' or '.join(styles)}")
    style = styles[name]
    if style.num_shots is not None and num_shots != style.num_shots:
        raise UserError(
            f"--prompt-style {name} defines {task} with {style.num_shots} examples; remove --num-fewshot "
            f"{num_shots}"
        )
    return style
