"""Evaluation by its command: several processes, resuming after a kill, errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import forkserver, launch
from helpers.evaluated_model import LIMIT, NEW, folders, model
from helpers.evaluating import SAMPLE

from ascendspeed.evaluation import lm_eval as harness
from ascendspeed.evaluation.answer_cache import FILE_NAME, AnswerCache
from ascendspeed.evaluation.prompts import PromptEncoder, build_prompts
from ascendspeed.evaluation.runner import EngineBackend
from ascendspeed.evaluation.tasks import find_style, load_benchmark
from ascendspeed.tokenization import tokenizer

SCRIPT = launch.ROOT / "tasks/evaluation/evaluation.py"


def run(folder: Path, *words: str, world: int = 1) -> tuple[int, str]:
    """The command, on some processes."""
    port = str(launch.free_port())
    processes, logs = [], []
    for rank in range(world):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
        env = launch.environment(**{name: str(value) for name, value in ranks.items()} if world > 1 else {})
        logs.append(folder.with_name(f"{folder.name}-rank{rank}.log"))
        logs[-1].unlink(missing_ok=True)
        processes.append(forkserver.start_script(SCRIPT, list(map(str, words)), env, logs[-1], launch.ROOT))
    for process in processes:
        process.join(300)
        process.kill()
    return max(process.exitcode for process in processes), "\n".join(log.read_text() for log in logs)


def records(folder: Path) -> list[dict]:
    """The answers, in the order of the file."""
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()[1:]]


def same(folder: Path, other: Path) -> None:
    """Asserts equal questions and grades, and log-likelihoods within the limit."""
    ours, others = records(folder), records(other)
    assert [r["key"] for r in ours] == [r["key"] for r in others]
    for a, b in zip(ours, others, strict=True):
        assert a["metrics"] == b["metrics"]
        assert a.get("text") == b.get("text")
        assert a.get("loglikelihoods") == pytest.approx(b.get("loglikelihoods"), abs=LIMIT)
    whole, other_whole = (json.loads((f / "results.json").read_text()) for f in (folder, other))
    assert whole["tasks"] == other_whole["tasks"]
    assert whole["model"]["sha256"] == other_whole["model"]["sha256"]


@pytest.mark.slow
def test_the_command_at_tp_2_has_the_answers_of_tp_1(folders, model, tmp_path):
    words = [
        "--load",
        folders["ours"],
        "--task",
        "mmlu gsm8k",
        "--task-data-path",
        SAMPLE,
        folders["gsm8k"],
        "--limit",
        "2",
    ]
    words += [
        "--num-fewshot",
        "2",
        "--max-new-tokens",
        NEW,
        "--device",
        "cpu",
        "--tp",
        "2",
        "--output-dir",
        tmp_path,
    ]
    code, output = run(tmp_path, *words, world=2)
    assert code == 0, output
    assert (
        output.count("10 questions, the first 2 of each subject only; 0 were answered before")
        == output.count("wrote ")
        == 1
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chart.png",
        "questions.jsonl",
        "results.csv",
        "results.json",
    ]
    whole = json.loads((tmp_path / "results.json").read_text())
    assert (whole["limit"], whole["settings"]["prompt_style"], whole["tasks"]["mmlu"]["questions"]) == (
        2,
        "lm-eval",
        8,
    )
    assert {"torch", "lm_eval", "megatron-core", "ascendspeed"} <= whole["versions"].keys()
    expected, encoder = records(tmp_path), PromptEncoder(tokenizer.load(folders["ours"]))
    loaded = [(load_benchmark("mmlu", SAMPLE, 2, 2), 2), (load_benchmark("gsm8k", folders["gsm8k"], 2, 2), 2)]
    prompts = [
        p
        for loaded_task, n in loaded
        for p in build_prompts(loaded_task, find_style("lm-eval", loaded_task.name, n), encoder, 1024, NEW)
    ]
    adapter = harness.HarnessModel(
        EngineBackend(model, encoder.tokenizer, 3), encoder, 1024, AnswerCache(None, whole["settings"])
    )
    grades = harness.grade_prompts(adapter, prompts, NEW)
    assert [grade.key for grade in grades] == [record["key"] for record in expected]
    for grade, record in zip(grades, expected, strict=True):
        own = adapter.answers.records[grade.key]
        assert grade.metrics == record["metrics"]
        assert own.get("text") == record.get("text")
        assert own.get("loglikelihoods") == pytest.approx(record.get("loglikelihoods"), abs=LIMIT)


@pytest.mark.slow
def test_the_command_at_pp_2_and_killed(folders, tmp_path):
    words = [
        "--load",
        folders["ours"],
        "--task",
        "mmlu",
        "hellaswag",
        "--task-data-path",
        SAMPLE,
        folders["hellaswag"],
    ]
    words += ["--device", "cpu"]
    code, output = run(tmp_path, *words, "--output-dir", tmp_path / "one")
    assert code == 0, output
    code, output = run(tmp_path, *words, "--output-dir", tmp_path / "two", "--pp", "2", world=2)
    assert code == 0, output
    same(tmp_path / "one", tmp_path / "two")
    command = [sys.executable, SCRIPT, *words, "--batch-size", "1", "--output-dir", tmp_path / "three"]
    with subprocess.Popen(
        list(map(str, command)), env=launch.environment(), stdout=subprocess.DEVNULL, cwd=launch.ROOT
    ) as process:
        while process.poll() is None and not (tmp_path / "three" / FILE_NAME).exists():
            pass
        process.kill()
    code, output = run(tmp_path, *words, "--output-dir", tmp_path / "three")
    assert code == 0, output
    same(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_eval_internlm_sh_says_what_is_wrong_in_one_line(folders, tmp_path):
    env = launch.environment(
        TASK="bigbench",
        DATA_PATH=str(SAMPLE),
        CHECKPOINT=str(folders["ours"]),
        TOKENIZER_PATH="",
        DTYPE="fp32",
        NPROC="1",
    )
    done = subprocess.run(
        ["bash", "tasks/evaluation/eval_internlm.sh", "--output-dir", str(tmp_path)],
        cwd=launch.ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error: --task bigbench does not exist; choose from mmlu" in done.stderr + done.stdout


@pytest.mark.slow
def test_an_answer_longer_than_the_model(folders, tmp_path):
    words = [
        "--load",
        folders["ours"],
        "--task",
        "gsm8k",
        "--task-data-path",
        folders["gsm8k"],
        "--output-dir",
        tmp_path,
    ]
    code, output = run(tmp_path, *words, "--max-input-length", "200", "--device", "cpu")
    assert (code, output.count("\n")) == (2, 1), output
    assert "--max-new-tokens 256 of gsm8k leaves none of the 200 tokens for the question" in output
