"""Loads tasks of lm-evaluation-harness by name, with its prompts and metrics, over dataset files on disk."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from ascendspeed.evaluation.harness_index import PREFIX, definition_folders
from ascendspeed.evaluation.readers import check_dataset_files
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line, shorten_list

FEWSHOT_SEED = 1234
"""Seed of the few-shot examples, the default of lm-evaluation-harness' command line."""


def load_tasks(name: str, folder: Path, num_fewshot: int | None) -> dict[str, Task]:
    """Loads a task, or the tasks of a group or tag, with the dataset files in `folder`.

    `num_fewshot`: None for that of each task. Raises UserError for a task that needs more than its files, and
    for files that do not fit.
    """
    manager, configs = _find_configs(name)
    datasets.disable_progress_bars()
    repositories = {config["dataset_path"] for config in configs.values()}
    overrides = []
    for task_name, config in configs.items():
        path, subset = find_dataset(name, folder, config, len(repositories) == 1)
        overrides.append({"task": task_name, "dataset_path": str(path), "dataset_name": subset})
    try:
        tasks = manager.load([{"group": "selected", "task": overrides}])["tasks"]
    except KeyError as error:
        raise UserError(
            f"--task-data-path {folder}: {PREFIX}{name} needs the split {error}, which the files do not have"
        ) from error
    except Exception as error:  # datasets and the task's own code raise anything
        reason = first_line(error.__cause__ or error)
        raise UserError(f"--task {PREFIX}{name} with {folder}: {reason}") from error
    for task in tasks.values():
        _check_splits(name, folder, task)
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


def _find_configs(name: str) -> tuple[TaskManager, dict[str, dict[str, Any]]]:
    """Returns a manager that knows the tasks of `name`, and their configurations."""
    folders = set(definition_folders(name))
    while True:
        manager = TaskManager(include_defaults=False, include_path=sorted(folders))
        members = list(_member_names(manager, name))
        missing = [member for member in members if member not in manager.task_index]
        if not missing:
            break
        folders |= {folder for member in missing for folder in definition_folders(member)}
    configs = {member: manager.task_index[member].cfg or {} for member in members}
    for member, config in configs.items():
        reason = _unsupported(config)
        if reason:
            raise UserError(f"--task {PREFIX}{name}: {member} {reason}")
    return manager, configs


def _member_names(manager: TaskManager, name: str) -> Iterator[str]:
    """Yields the names of the tasks of a task, group or tag; also of those that `manager` does not know."""
    entry = manager.task_index.get(name)
    if entry is None:
        yield name
        return
    members = sorted(entry.tags) if entry.kind.name == "TAG" else []
    if entry.kind.name == "GROUP":
        members = [m if isinstance(m, str) else m.get("task") or m["group"] for m in entry.cfg["task"]]
    if not members:
        yield name
    for member in members:
        yield from _member_names(manager, member)


def _unsupported(config: dict[str, Any]) -> str | None:
    """Returns why a task cannot run from dataset files alone."""
    if "class" in config:
        return "is a Python class of its own, which loads its data from the network"
    if config.get("unsafe_code"):
        return "executes generated code; use --task humaneval or mbpp with --allow-code-execution"
    if config.get("custom_dataset") or not config.get("dataset_path"):
        return "makes its data by code of its own"
    return None


def find_dataset(name: str, folder: Path, config: dict[str, Any], is_only: bool) -> tuple[Path, str | None]:
    """Returns path and subset of the dataset of a task for `datasets.load_dataset`.

    `is_only`: all tasks share one dataset, so `folder` may be the dataset itself.
    """
    repository = config["dataset_path"]
    names = (repository, repository.rpartition("/")[2])
    path = next((folder / part for part in names if (folder / part).is_dir()), folder if is_only else None)
    if path is None:
        raise UserError(
            f"--task-data-path {folder} has no folder {names[1]} with the dataset {repository}, which --task "
            f"{PREFIX}{name} needs"
        )
    check_dataset_files(path)
    subset = config.get("dataset_name")
    if subset is None or _declares(path / "README.md", subset):
        return path, subset
    return (path / subset if (path / subset).is_dir() else path), None


def _declares(card: Path, subset: str) -> bool:
    """Returns whether the card of a dataset lists the files of a subset."""
    pattern = rf"^\s*-?\s*config_name:\s*[\"']?{re.escape(subset)}[\"']?\s*$"
    return card.is_file() and bool(re.search(pattern, card.read_text("utf-8", "replace"), re.MULTILINE))


def _check_splits(name: str, folder: Path, task: ConfigurableTask) -> None:
    """Raises UserError if the dataset lacks a split that the task uses."""
    config = task.config
    scored = config.test_split or config.validation_split
    shots = config.fewshot_split if config.num_fewshot else None
    missing = [split for split in (scored, shots) if split and split not in task.dataset]
    if missing:
        raise UserError(
            f"--task-data-path {folder}: {config.task} of {PREFIX}{name} needs the split "
            f"{shorten_list(missing)}; the files have {shorten_list(sorted(task.dataset))}"
        )
