"""HumanEval and MBPP: prompts of lm-evaluation-harness, answers executed with the tests of their rows.

lm-evaluation-harness' own tasks load their checker from the network. Its rule is the same: an answer passes
if the program and its tests end without an exception.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task

from ascendspeed.evaluation.code_execution import passes
from ascendspeed.evaluation.harness_tasks import FEWSHOT_SEED, find_dataset
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line, shorten_list

Row = Mapping[str, Any]
Execute = Callable[[str], bool]
METRIC = "pass@1"
MBPP_EXAMPLES = (2, 3, 4)
"""`task_id` of the examples, as in lm-evaluation-harness."""
_MBPP_TESTS = "{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}"
REPOSITORIES = {
    "humaneval": {"dataset_path": "openai/openai_humaneval", "dataset_name": "openai_humaneval"},
    "mbpp": {"dataset_path": "google-research-datasets/mbpp", "dataset_name": "full"},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "humaneval": {
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "num_fewshot": 0,
    },
    "mbpp": {
        "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} "
        f"Your code should pass these tests:\n\n{_MBPP_TESTS}\n[BEGIN]\n",
        "doc_to_target": "{% if is_fewshot is defined %}{{code}}\n[DONE]{% else %}"
        f"{_MBPP_TESTS}{{% endif %}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["[DONE]"], "do_sample": False},
        "num_fewshot": 3,
    },
}


def load_code_task(
    name: str, folder: Path, num_fewshot: int | None, execute: Execute = passes
) -> dict[str, Task]:
    """Loads `humaneval` or `mbpp` from the files of its dataset. Raises UserError.

    `execute`: runs a program and returns whether it passes.
    """
    datasets.disable_progress_bars()
    path, subset = find_dataset(name, folder, REPOSITORIES[name], is_only=True)
    try:
        rows = datasets.load_dataset(str(path), subset)
    except Exception as error:  # datasets raises anything
        raise UserError(f"--task {name} with {folder}: {first_line(error.__cause__ or error)}") from error
    if "test" not in rows:
        raise UserError(
            f"--task-data-path {folder}: {name} needs the split test; the files have "
            f"{shorten_list(sorted(rows))}"
        )
    config = CONFIGS[name] | {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows["test"]},
        "test_split": "test",
        "output_type": "generate_until",
        "process_results": partial(_grade, name, execute),
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    if name == "mbpp":
        config["fewshot_config"] = {"sampler": "first_n", "samples": _examples(folder, rows)}
    most = config["num_fewshot"]
    if num_fewshot is not None and num_fewshot > most:
        raise UserError(f"--num-fewshot {num_fewshot}: {name} has {most} examples; choose 0 to {most}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about any custom dataset
    task = ConfigurableTask(config=config)
    task.set_config("num_fewshot", most if num_fewshot is None else num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return {name: task}


def _examples(folder: Path, rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of MBPP that are shown as examples. Raises UserError."""
    by_id = {row["task_id"]: dict(row) for row in rows.get("prompt", ())}
    if missing := [number for number in MBPP_EXAMPLES if number not in by_id]:
        raise UserError(
            f"--task-data-path {folder}: the split prompt of mbpp lacks task_id {shorten_list(missing)}, "
            "which are the examples"
        )
    return [by_id[number] | {"is_fewshot": True} for number in MBPP_EXAMPLES]


def _grade(name: str, execute: Execute, row: Row, answers: list[str]) -> dict[str, float]:
    """Returns whether the first answer to a row passes its tests."""
    if name == "humaneval":
        program = f"{row['prompt']}{answers[0]}\n{row['test']}\ncheck({row['entry_point']})"
    else:
        program = "\n".join((answers[0], *row["test_list"][:3]))
    return {METRIC: float(execute(program))}
