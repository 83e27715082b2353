"""Recomputation by the memory of a device: the fewest layers that fit, and the check of the measured peak."""

import dataclasses
import json
import logging
import re
from types import SimpleNamespace

import pytest
from helpers import launch, tiny_run

from ascendspeed.config.schema import Run
from ascendspeed.planning import auto_recompute, command
from ascendspeed.training.metric_lines import TrainLine, read_lines
from ascendspeed.utils.errors import UserError

MIB = 2**20


def run_of(size: int, words: str = "", devices: int = 1) -> Run:
    model = "--model internlm-tiny --num-layers 12 --auto-recompute-device-size"
    return command.resolve([*model.split(), str(size), *words.split(), "--devices", str(devices)])[1]


def recomputed(run: Run, per_stage: int) -> int:
    train = run.train
    if train.recompute_granularity == "none":
        return 0
    return per_stage if train.recompute_method == "uniform" else train.recompute_num_layers


@pytest.mark.breadth
@pytest.mark.parametrize(("words", "per_stage"), [("", 12), ("--pp 2", 6), ("--pp 2 --vpp 3", 2)])
@pytest.mark.parametrize("size", [1000, 230, 171, 170, 169, 110, 109, 5])
def test_the_fewest_layers_that_fit(words, per_stage, size):
    """Against a count of all numbers of layers; peaks fall by unequal steps."""
    devices = 2 if words else 1
    run = run_of(size, f"{words} --global-batch-size 8", devices)
    peaks = [(50 + round(120 * (1 - (i / per_stage) ** 1.5))) * MIB for i in range(per_stage + 1)]
    executed = []

    def plan(candidate: Run) -> SimpleNamespace:
        executed.append(recomputed(candidate, per_stage))
        rank = SimpleNamespace(rank=0, peak=peaks[executed[-1]], at_peak={"weights": peaks[executed[-1]]})
        return SimpleNamespace(ranks=[rank], peak=rank.peak)

    choice = auto_recompute.choose(run, devices, plan)
    fitting = [i for i in range(per_stage + 1) if peaks[i] <= size * MIB]
    assert choice.layers == (fitting[0] if fitting else per_stage)
    assert recomputed(choice.applied(run), per_stage) == choice.layers
    assert len(executed) == len(set(executed)) <= 7
    text = choice.text(size)
    assert f"{choice.layers} of {per_stage} layers" in text
    assert ("more than that" in text) == (not fitting)


def test_flags():
    """Another flag on recomputation wins, and the note says so; the search chooses it itself."""
    run, notes = command.resolve(
        ["--model", "internlm-tiny", "--auto-recompute-device-size", "9", "--checkpoint-activations"]
    )[1:]
    assert (run.train.auto_recompute_device_size, run.train.recompute_granularity) == (None, "full")
    assert any(note.startswith("--auto-recompute-device-size 9 has no effect") for note in notes)
    with pytest.raises(UserError, match="at least 1"):
        run_of(0)


@pytest.mark.parametrize(
    ("gib", "level"),
    [(1.0, logging.INFO), (1.04, logging.INFO), (1.06, logging.WARNING), (0.94, logging.WARNING)],
)
def test_the_measured_peak_is_compared_once(gib, level, caplog):
    choice = auto_recompute.Choice(1, 2, 2 * 2**30, 2**30, {})
    check = auto_recompute.PeakCheck(choice, "cuda", step=10)
    caplog.set_level(logging.INFO, "ascendspeed")
    for iteration in (11, 12, 13):
        check.write(TrainLine("", iteration, 20, memory_gib=gib if iteration > 11 else 0.1))
    (record,) = caplog.records
    assert record.levelno == level
    assert f"measured peak {gib * 1024:,.0f} MiB" in record.getMessage()


def test_a_cpu_is_not_measured(caplog):
    caplog.set_level(logging.INFO, "ascendspeed")
    check = auto_recompute.PeakCheck(auto_recompute.Choice(1, 2, MIB, MIB, {}), "cpu", step=0)
    check.write(TrainLine("", 5, 20, memory_gib=100.0))
    assert ["on a CPU" in record.getMessage() for record in caplog.records] == [True]


def test_what_cannot_be_planned_recomputes_everything(caplog):
    run = run_of(100)
    offloaded = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, zero_offload="cpu"))
    applied, choice = auto_recompute.apply(offloaded, None, None)
    assert (applied.train.recompute_granularity, choice) == ("full", None)
    assert "nothing was planned" in caplog.text


@pytest.mark.slow
def test_training_recomputes_some_layers_and_losses_stay(tmp_path):
    """A real plan chooses a part of four layers in training; losses equal those without recomputation."""
    words = [*tiny_run.flags(tmp_path, iterations=4), "--num-layers", "4", "--seq-length", "128"]
    plans = [
        launch.script("tools/plan.py", "--kernels", "cpu", "--json", *words, *more)
        for more in ([], ["--recompute-granularity", "full"])
    ]
    size = round(sum(json.loads(done.stdout)["peak"] for done in plans) / 2 / MIB)
    losses = []
    for name, more in (("none", []), ("auto", ["--auto-recompute-device-size", str(size)])):
        log = tmp_path / name
        done = launch.script("pretrain_intern.py", *words, *more, "--log-dir", log)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([line.loss for line in read_lines(log / "train.log")])
    assert losses[0] == losses[1]
    text = (tmp_path / "auto" / "train.log").read_text()
    chosen = re.search(r"(\d) of 4 layers of a pipeline stage are recomputed; planned peak .* = (\d+)", text)
    assert 0 < int(chosen[1]) < 4
    assert int(chosen[2]) <= size
    assert '"recompute_method": "block"' in text
    assert "on a CPU the peak" in text
