"""Profiles of training: times by kind from traces made by hand, and a run on two ranks."""

import json
import subprocess
import sys
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
from helpers import tiny_run
from helpers.launch import ROOT

from ascendspeed.cli import train_args
from ascendspeed.run_report import page, run_log
from ascendspeed.training import profile_summary
from ascendspeed.training.metric_lines import TrainLine, format_line
from ascendspeed.training.profile_summary import DATA, ITERATION
from ascendspeed.utils.errors import UserError


def event(name: str, begin: float, end: float, cat: str = "cpu_op") -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": end - begin}


def on_cpu(late: float = 0) -> list[dict]:
    """An iteration of 1000 us: an all-reduce of 200, half of it beside a product; `late`: further waiting."""
    notes = "user_annotation"
    return [
        event(ITERATION, 0, 1000 + late, notes),
        event(DATA, 0, 100, notes),
        event("aten::randn", 10, 90),
        event("aten::mm", 100, 400),
        event("aten::add", 150, 200),  # inside
        event("ReduceBackward", 400, 650),  # waits for the all-reduce
        event("c10d::allreduce_", 400, 410),
        event("aten::mm", 410, 510),
        event("gloo:all_reduce", 410, 610 + late, notes),
        event("Optimizer.step#AdamW.step", 700 + late, 950 + late, notes),
        event("aten::_fused_adamw_", 720 + late, 920 + late),
        event("aten::mm", 2000, 3000),  # after the iteration
        {"ph": "X", "name": "PyTorch Profiler (0)", "cat": "Trace", "ts": 0, "dur": 5000},
        {"ph": "M", "name": "process_name"},
    ]


def on_gpu() -> list[dict]:
    """Launches on the host do not count as work; kernels do."""
    return [
        event(ITERATION, 0, 1000, "user_annotation"),
        event(DATA, 0, 50, "user_annotation"),
        event("aten::mm", 50, 900),
        event("gemm", 100, 500, "kernel"),
        event("nccl:all_reduce", 100, 120, "user_annotation"),
        event("ncclDevKernel_AllReduce", 450, 650, "kernel"),
        event("Optimizer.step#AdamW.step", 700, 800, "gpu_user_annotation"),
        event("multi_tensor_apply", 700, 790, "kernel"),
        event("Memcpy", 800, 810, "gpu_memcpy"),
    ]


def measure(rank: int, events: list[dict]) -> profile_summary.TraceTimes:
    return profile_summary.measure(rank, events, ("gloo:", "ncclDevKernel"))


def test_kinds_on_a_cpu():
    times = measure(0, on_cpu())
    assert (times.iterations, times.total, times.compute, times.data) == (1, 1000, 400, 100)
    assert (times.exposed, times.optimizer) == (100, 200)
    assert times.collectives == [100]


def test_kinds_on_a_gpu():
    times = measure(0, on_gpu())
    assert (times.total, times.compute, times.exposed) == (1000, 410, 150)
    assert (times.data, times.optimizer) == (50, 90)


def test_waiting_is_the_excess_over_the_last_rank(tmp_path):
    """Rank 1 enters the all-reduce last: rank 0 waits for it."""
    slow = on_cpu()
    times = profile_summary.compare([measure(0, on_cpu(late=300)), measure(1, slow)])
    assert [(t.communication, t.waiting) for t in times] == [(0.1, pytest.approx(0.3)), (0.1, 0)]
    for rank in times:
        _, total, *kinds = astuple(rank)
        assert sum(kinds) == pytest.approx(total)
    busier = replace(times[1], compute=times[1].compute + 1, total=times[1].total + 1)
    assert profile_summary.slowest([times[0], busier]).rank == 1
    others = profile_summary.compare([measure(0, on_cpu(late=300)), measure(1, on_gpu()[:4])])
    assert others[0].waiting == 0, "another number of collectives"
    text = profile_summary.as_text([times[0], busier], "11-12")
    assert "slowest: rank 1" in text
    (tmp_path / "profile").mkdir()
    profile_summary.write_summary(tmp_path / "profile", times, "11-12")
    log = run_log.parse(
        tmp_path / "train.log", [format_line(TrainLine("2026-11-30 12:00:00", 1, 1, loss=1.0))]
    )
    html = page.render(log)
    assert "Profile of iterations 11-12" in html
    assert "waiting" in html


def test_flags():
    def resolved(words: str):
        return train_args.resolve(["--mock-data", *words.split()], 1)[0].train

    train = resolved("--profile --use-pytorch-profiler --profile-step-start 3 --profile-step-end 4")
    assert (train.profile, train.profile_step_start, train.profile_step_end) == (True, 3, 4)
    assert resolved("--profiling --profile_ranks 0 1").profile_ranks == (0, 1)
    for words, message in (
        ("--profile-step-start 1", "--profile-step-start belongs to --profile"),
        ("--profile --profile-step-start 12", "--profile-step-end 12: must be above --profile-step-start 12"),
        ("--profile --profile-step-start -1", "must be 0 or more"),
        ("--memory-snapshot-path a.pickle", "belongs to --record-memory-history"),
    ):
        with pytest.raises(UserError, match=message):
            resolved(words)


def test_what_this_machine_lacks_is_named(tmp_path):
    from ascendspeed.distributed.device import Device
    from ascendspeed.training.profiling import StepProfiler

    cpu, grid = Device("cpu", 0, "gloo", "CPU"), SimpleNamespace(rank=0, world=2)
    for words, message in (
        ("--record-memory-history", "--record-memory-history needs a CUDA device; this run is on cpu"),
        ("--profile --profile-ranks 0 2", "--profile-ranks 2: the ranks are 0 to 1"),
    ):
        run, _ = train_args.resolve(["--mock-data", *words.split()], 1)
        with pytest.raises(UserError, match=message):
            StepProfiler(run, grid, cpu)


def profiler_of(folder, *words):
    from ascendspeed.distributed.device import Device
    from ascendspeed.training.profiling import StepProfiler

    run, _ = train_args.resolve(["--mock-data", "--profile", "--log-dir", str(folder), *words], 1)
    grid = SimpleNamespace(rank=0, world=1, all_gather_object=lambda value: [value])
    return StepProfiler(run, grid, Device("cpu", 0, "gloo", "CPU"))


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    profiler = profiler_of(tmp_path, "--profile-step-start", "0", "--profile-step-end", "1")
    with profiler.iteration(0):
        pass
    (tmp_path / "profile").rmdir()
    (tmp_path / "profile").touch()
    with caplog.at_level("WARNING"):
        profiler.finish(1, is_last=False)
    assert "rank 0 could not write its trace" in caplog.text
    with pytest.raises(UserError, match="profile: File exists; choose another --log-dir"):
        profiler_of(tmp_path)


def test_a_profile_without_iterations_is_reported(tmp_path, caplog):
    profiler = profiler_of(tmp_path)
    with profiler.iteration(3), caplog.at_level("WARNING"):
        profiler.finish(4, is_last=True)
    assert "nothing was traced" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["", "--deepspeed --zero-stage 1 --bf16"])
def test_a_run_on_two_ranks(engine, tmp_path):
    """Traces of both ranks, times that add up, the same losses; the run ends before --profile-step-end."""
    flags = [*tiny_run.flags(tmp_path, iterations=4), *engine.split()]

    def train(*more: str) -> list[float]:
        command = [
            sys.executable,
            "-m",
            "ascendspeed.commands.intern",
            "train",
            "--nproc",
            "2",
            *flags,
            *more,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        lines = map(json.loads, (tmp_path / "logs/metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines]

    plain = train()
    assert train("--profile", "--profile-step-start", "1", "--profile-step-end", "9") == plain
    folder = tmp_path / "logs/profile"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["iterations"] == "2-4"
    assert [rank["rank"] for rank in summary["ranks"]] == [0, 1]
    for rank in summary["ranks"]:
        kinds = {name: value for name, value in rank.items() if name not in ("rank", "total")}
        assert sum(kinds.values()) == pytest.approx(rank["total"])
        assert min(kinds.values()) >= -1e-6
        assert min(rank["compute"], rank["optimizer"], rank["communication"]) > 0, rank
        events = profile_summary.read_events(folder / f"rank-{rank['rank']:05}.json.gz")
        assert sum(event["name"] == ITERATION for event in events if event["ph"] == "X") == 3
    assert f"slowest: rank {summary['slowest']}" in (tmp_path / "logs/train.log").read_text()
    assert "Profile of iterations 2-4" in (tmp_path / "logs/run.html").read_text()
