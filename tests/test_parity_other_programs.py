"""Logs of other programs: records, lines without a step number, and two runs in one log."""

import json
import math

import pytest
from helpers.training_logs import ours

from ascendspeed.loss_compare import compare as comparing
from ascendspeed.loss_compare import read_logs
from ascendspeed.loss_compare.align import align
from ascendspeed.loss_compare.curve import LoggedStep
from ascendspeed.utils.errors import UserError

LOSSES = [9.5, 8.75, 8.0, 7.5]
HISTORY = [
    {"loss": loss, "grad_norm": 1.25, "epoch": step / 4, "step": step} for step, loss in enumerate(LOSSES, 1)
]
STATE = {"global_step": 4, "log_history": [*HISTORY, {"eval_loss": 5.0, "step": 4}]}
STATE["log_history"].append({"train_loss": 8.4, "train_runtime": 9.0, "step": 4})


def trainer_lines(losses=LOSSES, per_epoch: int = 4) -> str:
    lines = ({"loss": loss, "epoch": step / per_epoch} for step, loss in enumerate(losses, 1))
    return "".join(f"{line}\n" for line in [*lines, {"eval_loss": 5.0, "epoch": 1.0}])


@pytest.mark.parametrize("indent", [None, 2])
def test_trainer_state(tmp_path, indent):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE, indent=indent))
    curve = read_logs.read_log(tmp_path)
    assert curve.kind == "trainer_state.json"
    assert curve.steps == tuple(
        LoggedStep(step, loss=loss, grad_norm=1.25, epoch=step / 4) for step, loss in enumerate(LOSSES, 1)
    )


def test_the_newest_checkpoint_of_a_trainer_has_the_whole_history(tmp_path):
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        history = [{"step": i, "loss": float(i)} for i in range(1, step + 1)]
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"log_history": history}))
    curve = read_logs.read_log(tmp_path)
    assert (len(curve.steps), curve.path) == (10, str(tmp_path / "checkpoint-10/trainer_state.json"))


def test_a_json_array_is_a_list_of_records(tmp_path):
    (tmp_path / "log.json").write_text(json.dumps(HISTORY, indent=1))
    assert [step.loss for step in read_logs.read_log(tmp_path / "log.json").steps] == LOSSES


def test_a_loss_that_is_nan_stays_nan(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": math.nan, "step": 1}]}))
    assert math.isnan(read_logs.read_log(tmp_path).steps[0].loss)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "a": 1\n}\n', "has no log_history"),
        ('{"log_history": {}}', "its entries are not JSON objects"),
        ("[1, 2]\n", "no training loss"),
        ('{"log_history": [{"step": 1, "loss": 2}, {"step": 1, "loss": 3}]}', "entry 2 repeats step 1"),
        ('{"step": 1, "loss": }\n', "line 1 is not valid JSON of a log"),
        ("{'epoch': 1.0}\n", "no training loss"),
    ],
)
def test_json_that_is_no_log(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_logs.read_log(tmp_path / "x.json")


def test_a_bracket_first_does_not_make_a_log_json(tmp_path):
    path = tmp_path / "x.log"
    path.write_text("{'loss': 2.5, 'epoch': 0.1}\n")
    assert read_logs.read_log(path).steps == (LoggedStep(loss=2.5, entry=1, epoch=0.1),)
    path.write_text("{ step:[    1/   10], loss:  2.5, lr: 1e-05 }\n")
    assert read_logs.read_log(path).steps == (LoggedStep(1, loss=2.5),)
    path.write_text("[2026-01-01] start\n" + ours(1, 2.5))
    assert read_logs.read_log(path).steps[0].loss == 2.5


def test_csv_of_one_run(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text('"Step","run 1 - train/loss","run 1 - train/loss__MIN"\n1,9.5,9.5\n2,8.75,8.75\n3,,\n')
    assert read_logs.read_log(path).steps == (
        LoggedStep(1, loss=9.5),
        LoggedStep(2, loss=8.75),
        LoggedStep(3),
    )
    path.write_text("Step,a - loss,b - loss\n1,2,3\n")
    with pytest.raises(UserError, match=r"several columns with a loss \(a - loss, b - loss\)"):
        read_logs.read_log(path)
    path.write_text("Step,loss\n1,2,3\n")
    with pytest.raises(UserError, match="row 2 has 3 cells, the header 2"):
        read_logs.read_log(path)


# --- lines without a step number


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_lines_without_steps_are_aligned_one_by_one(tmp_path):
    trainer = write(tmp_path / "a.log", trainer_lines())
    megatron = write(tmp_path / "b.log", "".join(ours(i, loss) for i, loss in enumerate(LOSSES, 1)))
    state = write(tmp_path / "trainer_state.json", json.dumps(STATE))
    for other in (trainer, megatron, state):
        comparison = comparing.compare(trainer, other)
        assert (comparison.aligned.axis, comparison.aligned.positions) == ("entry", (1, 2, 3, 4))
        assert comparison.metrics.maximum == 0
    assert comparing.compare(state, megatron).aligned.axis == "iteration"


def test_lines_that_cannot_be_of_the_same_steps_are_refused(tmp_path):
    trainer = write(tmp_path / "a.log", trainer_lines())
    for name, text, message in (
        ("shorter", trainer_lines(LOSSES[:3]), "has 4 lines with a loss, .* 3: .* give trainer_state.json"),
        ("slower", trainer_lines(per_epoch=8), r"line 1 with a loss is of epoch 0\.25 in .* and 0\.125 in"),
    ):
        with pytest.raises(UserError, match=message):
            comparing.compare(trainer, write(tmp_path / f"{name}.log", text))
    resumed = write(tmp_path / "resumed.log", trainer_lines() + trainer_lines(LOSSES[2:]))
    with pytest.raises(UserError, match=r"line 6 the epoch goes back from 1\.0 to 0\.25"):
        read_logs.read_log(resumed)


# --- a step twice


def test_two_ranks_that_differ_are_refused(tmp_path):
    """Interleaved logs of two ranks or runs are not a resumed run, also with other lines between them."""
    a, b = ([ours(i, loss + shift) for i, loss in enumerate(LOSSES, 1)] for shift in (0, 1))
    pairs = zip(a, b, strict=True)
    for text in (
        "".join(x + y for x, y in pairs),
        "".join(a + b),
        "".join(x + "time (ms)\n" + y + "time (ms)\n" for x, y in zip(a, b, strict=True)),
        "".join(a[:2] + b[:2] + a[2:] + b[2:]),
    ):
        with pytest.raises(UserError, match=r"repeats step \d with another loss .*before: loss"):
            read_logs.read_log(write(tmp_path / "x.log", text))
    curve = read_logs.read_log(write(tmp_path / "same.log", "".join(x + x for x in a)))
    assert ([step.loss for step in curve.steps], curve.replaced) == (LOSSES, 4)
    assert align(curve, curve).positions == (8, 16, 24, 32)


def test_control_a_restart_replaces_with_other_losses(tmp_path):
    first = "".join(ours(i, loss) for i, loss in enumerate(LOSSES, 1))
    again = "resumed from iteration 2\n" + ours(3, 1.0) + ours(4, 0.5)
    curve = read_logs.read_log(write(tmp_path / "x.log", first + again))
    assert [step.loss for step in curve.steps] == [*LOSSES[:2], 1.0, 0.5]
