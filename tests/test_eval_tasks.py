"""--eval-tasks: scores during training are those of the evaluation command, and change nothing."""

import json
import random
import re
from pathlib import Path

import pytest
from helpers import evaluating, launch

from ascendspeed.cli import train_args
from ascendspeed.evaluation import training_scores
from ascendspeed.run_report import page, run_log
from ascendspeed.training.metric_lines import ScoreLine, TrainLine, format_line, parse_line, scalars
from ascendspeed.training.metrics_file import as_json
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and benchmarks that are scored by log-likelihood and by generated answers."""
    folder = tmp_path_factory.mktemp("eval_tasks")
    evaluating.model_dir(folder / "model")
    evaluating.boolq(folder / "boolq", count=40)
    evaluating.gsm8k(folder / "gsm8k", count=1)
    path = evaluating.hellaswag(folder / "hellaswag", count=60) / "hellaswag_val.jsonl"
    draw = random.Random(3)
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    for row in rows:  # endings whose order by likelihood changes with the weights
        row["endings"] = ["".join(draw.choices("abcdefgh ", k=20)) for _ in range(4)]
    evaluating.put_jsonl(path, rows)
    return folder


def flags(folder: Path, *names: str) -> list[str]:
    words = f"--load {folder}/model --tokenizer-name-or-path {folder}/model --mock-data --seq-length 64"
    paths = [str(folder / name) for name in names]
    return [*words.split(), "--eval-tasks", *names, "--eval-tasks-data-path", *paths]


def test_a_line_is_read_as_it_was_written(tmp_path):
    line = ScoreLine(20, "lm-eval:ifeval", "exact_match,strict", 0.1 + 0.2, 57)
    assert parse_line(format_line(line)).score == pytest.approx(line.score, rel=1e-8)
    assert parse_line(format_line(line)).task == line.task
    assert as_json(line)["split"] == "score"
    assert dict(scalars(line)) == {"score lm-eval:ifeval exact_match,strict": line.score}
    train = [TrainLine("2026-11-30 12:00:00", i, 9, loss=1.0) for i in (10, 20)]
    lines = [train[0], ScoreLine(10, "mmlu", "acc", 0.25, 4), train[1], ScoreLine(20, "mmlu", "acc", 0.5, 4)]
    log = run_log.parse(tmp_path / "train.log", map(format_line, lines))
    assert [line.score for line in log.scores] == [0.25, 0.5]
    html = page.render(log)
    assert "mmlu: acc" in html
    assert '<td class="n">0.5000</td>' in html
    log.add(format_line(train[1]))  # a resumed run repeats iteration 20
    assert [line.iteration for line in log.scores] == [10]


@pytest.mark.parametrize(
    ("more", "world", "message"),
    [
        ("--eval-tasks-interval 0", 1, "--eval-tasks-interval 0: must be at least 1"),
        ("", 1, "--eval-tasks needs --eval-tasks-interval"),
        (
            "--eval-tasks-interval 1 --lora-rank 2",
            1,
            "does not support --lora-rank: evaluate the checkpoints",
        ),
        ("--eval-tasks-interval 1 --pp 2", 4, "pipeline stages together with data or context parallel"),
    ],
)
def test_what_is_not_supported_is_named(folders, more, world, message):
    with pytest.raises(UserError, match=message):
        train_args.resolve([*flags(folders, "boolq"), *more.split()], world)


def test_benchmarks_are_checked_before_the_start(folders):
    def refused(words: list[str], message: str) -> None:
        run, _ = train_args.resolve([*words, "--eval-tasks-interval", "1"], 1)
        with pytest.raises(UserError, match=message):
            training_scores.resolve(run)

    refused(flags(folders, "none"), "--eval-tasks")
    refused(flags(folders, "boolq", "gsm8k")[:-1], "--eval-tasks names 2 .* and --eval-tasks-data-path 1")
    refused(flags(folders, "humaneval"), "would execute the answers of the model")
    with pytest.raises(UserError, match="--eval-tasks-limit belongs to --eval-tasks"):
        train_args.resolve(["--mock-data", "--eval-tasks-limit", "1"], 1)
    run, _ = train_args.resolve([*flags(folders, "boolq"), "--eval-tasks-interval", "1"], 1)
    assert training_scores.resolve(run).benchmarks[0][0].name == "boolq"


LAYOUTS = {
    "Megatron, TP 2": (2, "--tp 2 --sequence-parallel --bf16"),
    "Megatron, PP 2": (2, "--pp 2 --use-distributed-optimizer"),
    "Megatron, DP 2, overlapped": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --hidden-dropout 0.1",
    ),
    "FSDP 2": (2, "--use-torch-fsdp2 --bf16"),
    "CP 2": (2, "--cp 2"),
    "DeepSpeed, TP 2, ZeRO 2": (2, "--deepspeed --zero-stage 2 --tp 2 --sequence-parallel"),
    "DeepSpeed, ZeRO 1": (1, "--deepspeed --zero-stage 1 --bf16 --cpu-linear onednn"),
    "DeepSpeed, ZeRO 3": (2, "--deepspeed --zero-stage 3 --bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_the_evaluation_command(layout, folders, tmp_path):
    """The losses have the bits of a run without scores."""
    processes, words = LAYOUTS[layout]
    names = ("boolq", "hellaswag", "gsm8k")

    def train(name: str, *more: str) -> list[dict]:
        settings = "--lr 2e-2 --train-iters 3 --global-batch-size 4 --micro-batch-size 2 --device cpu"
        settings += f" --log-dir {tmp_path}/{name} {words}"
        logs = tmp_path / f"{name}-ranks"
        logs.mkdir()
        launch.forked(processes, launch.ROOT / "pretrain_intern.py", [*more, *settings.split()], logs)
        return list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()))

    all_flags = flags(folders, *names)
    plain = train("plain", *all_flags[: all_flags.index("--eval-tasks")])
    saves = ["--save", str(tmp_path / "saved"), "--save-interval", "3"]
    lines = train("scored", *all_flags, "--eval-tasks-interval", "1", *saves)
    losses = [(line["loss"], line.get("grad_norm")) for line in lines if line["split"] == "train"]
    assert losses == [(line["loss"], line.get("grad_norm")) for line in plain]
    scored = [line for line in lines if line["split"] == "score"]
    scores = {(line["iteration"], line["task"]): line["score"] for line in scored}
    assert len(scores) == 3 * len(names)
    last, before = ({name: scores[step, name] for name in names} for step in (3, 2))
    precision = "--bf16" if "--bf16" in words else "--device cpu"
    linear = re.findall(r"--cpu-linear \w+", words)
    checkpoint = f"--load {tmp_path}/saved/step_0000003 --tokenizer-name-or-path {folders}/model --device cpu"
    tasks = ["--task", *names, "--task-data-path", *(str(folders / name) for name in names)]
    output = f"{checkpoint} {precision} {' '.join(linear)} --output {tmp_path}/out".split()
    launch.must("tasks/evaluation/evaluation.py", *output, *tasks)
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    expected = {name: results[name]["micro"] for name in names}
    assert last == expected
    assert before != expected, "a control: weights that are one iteration old would fail"
