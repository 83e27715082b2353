"""Names of lm-evaluation-harness' own tasks and the folders of their YAML files, without importing it."""

import difflib
import importlib.util
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from ascendspeed.utils.errors import UserError

PREFIX = "lm-eval:"
"""Begin of a --task that is a task, group or tag of lm-evaluation-harness."""
CODE_TASKS = ("humaneval", "mbpp")
"""Values of --task whose answers are executed (`code_tasks`)."""
GROUPS = {"agieval": "agieval", "bbh": "bbh"}
"""Values of --task that are short for a task of lm-evaluation-harness."""
_NAME = re.compile(r"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([\w.+:-]+)["']?[ \t]*$""", re.MULTILINE)
_TAGS = re.compile(r"""^["']?tag["']?:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n?)+)""", re.MULTILINE)


def harness_name(task: str) -> str | None:
    """Returns lm-evaluation-harness' name of a --task; None if the task has an `EvaluationTask`."""
    if task in CODE_TASKS:
        return task
    if task.startswith(PREFIX):
        return task.removeprefix(PREFIX)
    return GROUPS.get(task)


@cache
def _definitions() -> dict[str, set[Path]]:
    """Name -> folders directly below lm-evaluation-harness' tasks that define it; a tag has several."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("evaluation needs lm-evaluation-harness: pip install -e '.[eval]'")
    root = Path(next(iter(spec.submodule_search_locations)), "tasks")
    definitions: dict[str, set[Path]] = defaultdict(set)
    for path in root.glob("*/**/*.yaml"):
        text = path.read_text(encoding="utf-8")
        tags = [line.strip(" \t-\"'") for block in _TAGS.findall(text) for line in block.splitlines()]
        for name in (*_NAME.findall(text), *tags):
            definitions[name].add(root / path.relative_to(root).parts[0])
    return definitions


def definition_folders(name: str) -> list[Path]:
    """Returns the folders whose YAML files define a task, group or tag. Raises UserError with near names."""
    definitions = _definitions()
    if name not in definitions:
        near = difflib.get_close_matches(name, definitions, 3, 0.75)
        advice = f"; did you mean {' or '.join(PREFIX + match for match in near)}?" if near else ""
        raise UserError(f"--task {PREFIX}{name}: lm-evaluation-harness has no such task or group{advice}")
    return sorted(definitions[name])
