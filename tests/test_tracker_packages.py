"""The packages of --report-to themselves, offline: every number arrives, and a resumed run is one run."""

import contextlib
import json
import sqlite3
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tracked_run import line, run_of

from ascendspeed.config.schema import Run
from ascendspeed.training import trackers
from ascendspeed.training.metric_lines import EvalLine, MetricsLine, ScoreLine, scalars
from ascendspeed.training.metrics_log import MetricsLogger

pytestmark = pytest.mark.slow
LINES = (
    line(1),
    line(2, 2.25),
    EvalLine(2, 2.0),
    ScoreLine(2, "lm-eval:ifeval", "exact_match,strict", 0.25, 8),
)
RESUMED = line(3, 2.0)
TAGS = {tag for each in LINES for tag, _ in scalars(each)}
LOSSES = [(1, 2.5), (2, 2.25), (3, 2.0)]


def record(run: Run, step: int, *lines: MetricsLine) -> None:
    """Writes lines as a run that begins at `step` does."""
    with MetricsLogger(0, run.train.log_dir) as log:
        sinks = trackers.open_trackers(run, step)
        log.add_sinks(sinks)
        for each in lines:
            log.line(each)


def record_twice(folder: Path, name: str, capsys) -> str:
    """Writes a run of two iterations, then the third of the resumed run; returns the identity of the run."""
    run = run_of(folder)
    run = replace(run, train=replace(run.train, report_to=(name,), wandb_project=None))
    record(run, 0, *LINES)
    record(run, 2, RESUMED)
    assert "warning" not in capsys.readouterr().out
    return json.loads((folder / trackers.IDENTITY_FILE).read_text())["id"]


def test_mlflow(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    record_twice(tmp_path, "mlflow", capsys)
    client = mlflow.MlflowClient()
    (experiment,) = (e for e in client.search_experiments() if e.name == trackers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == str(run_of(tmp_path).optim.lr)
    history = client.get_metric_history(run.info.run_id, "lm loss")
    assert [(metric.step, metric.value) for metric in history] == LOSSES
    assert len(run.data.metrics) == len(TAGS)
    assert run.data.metrics["elapsed time per iteration ms"] == 250.0
    assert run.data.metrics["score lm-eval:ifeval exact_match_strict"] == 0.25


def wandb_records(path: Path):
    """Yields the records of a .wandb file: LevelDB's log format, with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, block = path.read_bytes(), 7, [], 32768
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def test_wandb(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    identity = record_twice(tmp_path, "wandb", capsys)
    rows, ids = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for entry in wandb_records(path):
            if entry.WhichOneof("record_type") == "run":
                ids.add((entry.run.project, entry.run.run_id))
            if entry.WhichOneof("record_type") == "history":
                items = entry.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    assert ids == {(trackers.PROJECT, identity)}
    assert [(row["_step"], row["lm loss"]) for row in rows] == LOSSES
    assert rows[1]["lm loss validation"] == 2.0  # lines of one iteration are one step
    assert rows[1]["score lm-eval:ifeval exact_match_strict"] == 0.25
    assert sum(not key.startswith("_") for key in rows[1]) == len(TAGS)


def test_trackio(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    record_twice(tmp_path, "trackio", capsys)
    with contextlib.closing(sqlite3.connect(tmp_path / f"trackio/{trackers.PROJECT}.db")) as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    assert len({run_id for run_id, *_ in rows}) == 1
    metrics = [(step, json.loads(text)) for _, step, text in rows]
    assert [(step, row["lm loss"]) for step, row in metrics if "lm loss" in row] == LOSSES
    assert len({tag for _, row in metrics for tag in row}) == len(TAGS)


def test_swanlab(tmp_path, monkeypatch, capsys):
    pytest.importorskip("swanlab")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    identity = record_twice(tmp_path, "swanlab", capsys)
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(identity.encode() in content and b"lm loss" in content for content in contents)
