"""metrics.jsonl and trackers: resumed runs, failing trackers, Megatron's tags."""

import json
import math
from dataclasses import replace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from helpers.tracked_run import line, run_of

from ascendspeed.training import trackers
from ascendspeed.training.metric_lines import EvalLine, scalars
from ascendspeed.training.metrics_file import MetricsFile
from ascendspeed.training.metrics_log import MetricsLogger
from ascendspeed.utils.errors import UserError


def records(folder) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, step: int, iterations) -> None:
    file = MetricsFile(folder, step)
    for i in iterations:
        file.write(line(i))
    file.close()


def test_a_resumed_run_repeats_no_step(tmp_path):
    write(tmp_path, 0, range(1, 6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "lo')  # killed
    write(tmp_path, 3, range(4, 8))
    assert [record["iteration"] for record in records(tmp_path)] == [*range(1, 8)]
    write(tmp_path, 0, [1])
    assert [record["iteration"] for record in records(tmp_path)] == [1]
    assert len((tmp_path / "metrics-1.jsonl").read_text().splitlines()) == 7  # the earlier run


def test_records_are_json_without_nan(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.write(line(1, math.nan))
    file.write(EvalLine(1, 2.0))
    file.close()
    train, validation = records(tmp_path)
    assert (train["loss"], train["split"], train["lr"]) == (None, "train", 1e-3)
    assert validation == {"split": "validation", "iteration": 1, "loss": 2.0}


def test_tags_of_megatron():
    tags = dict(scalars(line(1)))
    assert tags["learning-rate"] == tags["learning rate"] == 1e-3
    assert tags["iteration-time"] == 0.25
    assert dict(scalars(EvalLine(1, 0.0)))["lm loss validation ppl"] == 1


class Toy(GeneralTracker):
    """Keeps what it receives."""

    name = "wandb"  # takes the place of a tracker that is not installed
    requires_logging_directory = False
    opened: list = []  # noqa: RUF012
    fails = False

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.values = project, options, []

    @property
    def tracker(self):
        return self

    def start(self):
        if self.options.get("entity") == "down":
            raise ConnectionError("no route to host\nmore")
        Toy.opened.append(self)

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **kwargs):
        if Toy.fails:
            raise ConnectionError("quota")
        self.values.append((step, values))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Toy)
    monkeypatch.setattr(Toy, "opened", [])
    monkeypatch.setattr(Toy, "fails", False)


def test_a_resumed_run_continues_in_the_same_run(toy, tmp_path):
    run = run_of(tmp_path)
    for step in (0, 5, 0):
        with MetricsLogger(0, tmp_path) as log:
            log.add_sinks(trackers.open_trackers(run, step))
            log.line(line(step + 1))
    first, resumed, other = Toy.opened
    assert first.options["id"] == resumed.options["id"] != other.options["id"]
    assert (first.options["resume"], first.options["name"], first.project) == ("allow", "e", "p")
    assert first.settings["optim.lr"] == run.optim.lr
    assert first.settings["data.data_path"] == "a b"
    assert [step for step, _ in resumed.values] == [6]
    assert resumed.values[0][1]["lm loss"] == 2.5


def test_a_failing_tracker_is_a_warning(toy, tmp_path, capsys):
    with MetricsLogger(0, tmp_path) as log:
        log.add_sinks(trackers.open_trackers(run_of(tmp_path), 0))
        Toy.fails = True
        log.line(line(1))
        log.line(line(2))
        log.add_sinks(trackers.open_trackers(run_of(tmp_path, wandb_entity="down"), 0))
    text = capsys.readouterr().out
    assert text.count("warning: --report-to wandb: quota; no more is written there") == 1
    assert "warning: --report-to wandb: ConnectionError: no route to host; nothing is written there" in text
    assert text.count("iteration        ") >= 2


def test_names(tmp_path):
    run = run_of(tmp_path, report_to=("tensorboard", "mlflow", "mlflow"))
    assert trackers.names_of(run.train) == ["mlflow", "wandb"]
    assert trackers.events_dir(run.train) == str(tmp_path / "tensorboard")
    assert trackers.events_dir(replace(run.train, tensorboard_dir="t")) == "t"
    with pytest.raises(UserError, match="--report-to unheard_of: the package is missing: pip install"):
        trackers.check_installed(["json", "unheard_of"])
