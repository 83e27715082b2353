"""HumanEval and MBPP: prompts of lm-evaluation-harness, and answers executed in confined processes."""

import socket
import threading
from pathlib import Path

import pytest
from helpers.evaluating import HARNESS, Loader, put_jsonl
from yaml import load

from ascendspeed.evaluation import code_execution
from ascendspeed.evaluation.args import resolve
from ascendspeed.evaluation.code_execution import passes
from ascendspeed.utils.errors import UserError


def humaneval(folder: Path) -> Path:
    row = {
        "prompt": 'def add(a, b):\n    """Adds."""\n',
        "test": "def check(f):\n    assert f(2, 3) == 5",
        "entry_point": "add",
    }
    put_jsonl(folder / "test.jsonl", [row, row | {"prompt": "def add(a, b):\n"}])
    return folder


def mbpp(folder: Path, examples=(2, 3, 4)) -> Path:
    def row(number: int) -> dict:
        tests = [f"assert f({n}) == {n + 1}" for n in range(3)]
        return {
            "task_id": number,
            "text": f"Add {number}.",
            "code": "def f(n):\r\n  return n + 1",
            "test_list": tests,
        }

    put_jsonl(folder / "full/test.jsonl", [row(11), row(12)])
    put_jsonl(folder / "full/prompt.jsonl", [row(number) for number in examples])
    card = "---\nconfigs:\n- config_name: full\n  data_files:\n"  # as the hub's names the splits
    card += "".join(f"  - split: {split}\n    path: full/{split}.jsonl\n" for split in ("prompt", "test"))
    (folder / "README.md").write_text(card + "---\n")
    return folder


class WithoutFunctions(Loader):
    """Reads lm-evaluation-harness' files without their functions, which load a checker from the network."""


WithoutFunctions.add_constructor("!function", lambda loader, node: None)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_the_configurations_are_those_of_lm_eval(name):
    from ascendspeed.evaluation.code_tasks import CONFIGS, REPOSITORIES

    published = load((HARNESS / name / f"{name}.yaml").read_text(), WithoutFunctions)
    for key, value in CONFIGS[name].items():
        assert published[key] == value, key
    assert published["dataset_path"] == REPOSITORIES[name]["dataset_path"]


def scored(name: str, folder: Path, answer: str, execute=passes) -> list[float]:
    """Scores of one answer to every row."""
    from ascendspeed.evaluation.code_tasks import METRIC, load_code_task

    task = load_code_task(name, folder, None, execute)[name]
    return [task.process_results(row, [answer])[METRIC] for row in task.dataset["test"]]


def test_answers_are_graded_by_their_tests(tmp_path):
    assert scored("humaneval", humaneval(tmp_path / "h"), "    return a + b\n") == [1, 1]
    assert scored("humaneval", tmp_path / "h", "    return a - b\n") == [0, 0]
    assert scored("mbpp", mbpp(tmp_path / "m"), "def f(n):\n    return n + 1\n") == [1, 1]
    assert scored("mbpp", tmp_path / "m", "def f(n):\n    return [1, 2, 4][n]\n") == [
        0,
        0,
    ]  # fails the last test


def test_the_examples_of_mbpp_end_with_done(tmp_path):
    from ascendspeed.evaluation.code_tasks import load_code_task

    task = load_code_task("mbpp", mbpp(tmp_path), None)["mbpp"]
    context = task.fewshot_context(task.dataset["test"][0], 3)
    assert context.count("[DONE]") == context.count("[BEGIN]") - 1 == 3
    assert (
        context.index("Add 2.") < context.index("Add 3.") < context.index("Add 4.") < context.index("Add 11.")
    )
    with pytest.raises(UserError, match="num-fewshot 4: mbpp has 3 examples; choose 0 to 3"):
        load_code_task("mbpp", tmp_path, 4)
    with pytest.raises(UserError, match="split prompt of mbpp lacks task_id 4"):
        load_code_task("mbpp", mbpp(tmp_path / "few", (2, 3)), None)


PROGRAMS = {
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "too much memory": "x = bytearray(600 << 20)",
    "too large a file": "open('x', 'wb').write(bytes(17 << 20))",
    "an endless loop": "while True: pass",
    "a process left behind": "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nraise SystemExit(1)",
    "its input": "input()",
}


def test_programs_are_confined():
    """Each of these fails inside; the same connection succeeds outside."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: [server.accept() for _ in range(1)], daemon=True).start()
        for name, program in PROGRAMS.items():
            assert not passes(program.replace("{port}", str(port)), seconds=2), name
        socket.create_connection(("127.0.0.1", port), 2).close()
    assert passes("import os\nassert not [k for k in os.environ if k not in ('HOME', 'PATH', 'LC_CTYPE')]")
    assert passes("open('x', 'w').write('x')\nimport math, typing, collections")


def test_a_machine_that_cannot_isolate_is_one_line(monkeypatch):
    monkeypatch.setattr(code_execution, "_CHILD", f"import sys; sys.exit({code_execution.NO_ISOLATION})")
    with pytest.raises(UserError, match="cannot start a process without network"):
        passes("pass")


def test_execution_must_be_allowed(tmp_path):
    words = ["--load", "x", "--task", "humaneval", "--task-data-path", str(tmp_path)]
    with pytest.raises(UserError, match=r"executes the answers .* add --allow-code-execution"):
        resolve(words, 1)
