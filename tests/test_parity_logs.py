"""Logs of other programs and of this project, also resumed, torn and appended to."""

import json
import math

import pytest
from helpers.training_logs import SAMPLES, ours
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.loss_compare import console_logs, read_logs
from ascendspeed.loss_compare.align import align
from ascendspeed.loss_compare.curve import (
    LoggedStep,
    SignificantDigits,
    drop_replaced_steps,
    parse_number,
    parse_step,
)
from ascendspeed.training import metric_lines, metrics_log
from ascendspeed.utils.errors import UserError

NOISE = """\
[2024-03-07 15:27:02,646] [INFO] [timer.py:260:stop] epoch=0/micro_step=199/global_step=199, \
RunningAvgSamplesPerSec=58.7
[2024-03-07 15:27:15,063] [INFO] [logging.py:96:log_dist] [Rank 0] step=200, skipped=4, lr=[0.00024], \
mom=[(0.9, 0.999)]
time (ms) | forward: 659.86 | backward: 2164.69 | optimizer: 1172.51 | batch generator: 0.83
 validation loss at iteration 100 | lm loss value: 2.345678E+00 | lm loss PPL: 1.044E+01 |
(min, max) time across ranks (ms):
"""


@pytest.mark.parametrize(("line", "step"), SAMPLES.values(), ids=SAMPLES.keys())
def test_real_lines(tmp_path, line, step):
    path = tmp_path / "their.log"
    path.write_text(NOISE + line + "\n" + NOISE)
    assert read_logs.read_log(path).steps == (step,)


def test_control_a_neighbour_of_the_loss_is_not_the_loss():
    """Labels are compared whole: with `in` instead, the first of these would be read."""
    line = " iteration 1/ 2 | moe lm loss: 9.0 | lm loss: 2.0 | lm loss value: 7.0 | mtp_1 loss: 3.0 |\n"
    assert console_logs.parse_console_log("x", [line]).steps[0].loss == 2.0
    assert console_logs.parse_console_log("x", [" iteration 1/ 2 | mtp_1 loss: 3.0 |\n"]).steps == ()


def test_lines_that_ran_into_each_other_are_none():
    assert (
        console_logs.parse_console_log(
            "x", [" iteration 1/ 2 | lm loss: 2.0 | iteration 2/ 2 | lm loss: 3.0 |\n"]
        ).steps
        == ()
    )


@pytest.mark.parametrize("name", [name for name in SAMPLES if "DeepSpeed's" not in name])
def test_a_torn_line_gives_no_wrong_number(name):
    line, whole = SAMPLES[name]
    for cut in range(1, len(line)):
        for step in console_logs.parse_console_log("x", [line[:cut]]).steps:
            for field, value in vars(step).items():
                assert value is None or value == getattr(whole, field), (line[:cut], field)


def test_settings_and_device(tmp_path):
    run = {"train": {"seed": 7}, "optim": {"lr": 1e-3}}
    devices = "device: cpu (AMD EPYC), gloo; 4 processes: TP 2 x DP 2"
    (tmp_path / "train.log").write_text(f"{devices}\nrun: {json.dumps(run)}\nrun: {{torn\n{ours(1, 2.5)}")
    curve = read_logs.read_log(tmp_path)
    assert (curve.config, curve.device, curve.digits["loss"]) == (run, devices.removeprefix("device: "), 9)
    arguments = (
        "0: ------------------------ arguments ------------------------\n"
        "0:   seq_length ...................................... 1024\n"
    )
    curve = console_logs.parse_console_log(
        "x", [*arguments.splitlines(True), SAMPLES["AscendSpeed"][0] + "\n"]
    )
    assert (curve.config, curve.digits) == ({"seq_length": "1024"}, {"loss": 7, "grad_norm": 4})


def test_run_json_beside_a_log_that_says_nothing(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (tmp_path / "run.json").write_text('{"train": {"seed": 7}}')
    assert read_logs.read_log(tmp_path / "x.jsonl").config == {"train": {"seed": 7}}


def test_a_resumed_run_replaces_what_was_done_beyond_its_checkpoint(tmp_path):
    lines = (
        [ours(i, float(i)) for i in (1, 2, 3, 4)] + ["half a li\n"] + [ours(i, i + 0.5) for i in (3, 4, 5)]
    )
    (tmp_path / "train.log").write_text("".join(lines))
    curve = read_logs.read_log(tmp_path)
    assert [step.loss for step in curve.steps] == [1.0, 2.0, 3.5, 4.5, 5.5]
    assert curve.replaced == 2


def test_a_run_begun_again_in_the_same_log_leaves_nothing_of_the_old_one():
    steps, replaced = drop_replaced_steps(
        [LoggedStep(i, loss=1.0) for i in range(1, 6)] + [LoggedStep(i, loss=2.0) for i in range(1, 4)]
    )
    assert ([step.iteration for step in steps], {step.loss for step in steps}, replaced) == (
        [1, 2, 3],
        {2.0},
        5,
    )


@given(st.lists(st.integers(0, 9)))
def test_continuous_always_grows_and_ends_with_the_last(places):
    steps, replaced = drop_replaced_steps(LoggedStep(iteration) for iteration in places)
    iterations = [step.iteration for step in steps]
    assert iterations == sorted(set(iterations))
    assert iterations[-1:] == places[-1:]
    assert len(iterations) + replaced == len(places)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.5", 1.5),
        (" 2E-3 ", 2e-3),
        ("4000.0/4100.0", 4000.0),
        ("112.9TFLOPS", 112.9),
        ("inf", math.inf),
        (7, 7.0),
    ]
    + [(text, None) for text in ("1.258B", "6.1.2", "", "0:00:01", "54.85%", None, "x")],
)
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("texts", "digits"),
    [
        (["2.382640E+00", "1.5E-03"], 7),
        (["1.00000000E+00", "0.00000000E+00"], 9),
        (["0.000012"], 2),
        (["123.456789", "0.000012"], 2),  # all rounded to six decimals
        (["11.634403228759766", "9.5"], 17),  # all as short as they can be
        (["4.4512", "10.12"], 5),
        (["nan", "inf", "0.25/9.123456789"], 2),
    ],
)
def test_digits(texts, digits):
    seen = SignificantDigits()
    for text in texts:
        seen.count({"Grad-Norm": text})
    assert seen.by_field == {"grad_norm": digits}


def test_the_interval_of_a_line():
    assert console_logs.parse_console_log("x", [ours(20, 2.0, interval=5)]).steps[0].interval == 5


def test_nan_is_read_as_nan():
    assert math.isnan(parse_step({"step": 1, "loss": "nan"}).loss)


# --- JSON lines


def test_json_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"iteration": 1, "consumed_samples": 8, "lm loss": 2.5, "grad_norm": 1.25, "last": true}\n\n'
        '{"current_steps": 2, "total_steps": 9, "samples": 16, "loss": 2.25}\n{"step": 2, "eval_loss": '
        '9}\n{"step": 3, "lo'
    )
    curve = read_logs.read_log(path)
    assert curve.steps == (
        LoggedStep(1, 8, loss=2.5, grad_norm=1.25),
        LoggedStep(2, 16, loss=2.25, train_iters=9),
    )
    assert curve.kind == "JSON lines"
    path.write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.0, "grad_norm": Infinity}\n'
    )  # as Python writes them
    assert [math.isnan(step.loss) for step in read_logs.read_log(path).steps] == [True, False]


def test_json_that_is_of_no_step(tmp_path):
    """Hugging Face's last line, a mean over the run, repeats the last step; evaluations do too."""
    path = tmp_path / "log.jsonl"
    steps = '{"loss": 2.5, "step": 1}\n{"loss": 2.25, "step": 2}\n'
    expected = (LoggedStep(1, loss=2.5), LoggedStep(2, loss=2.25))
    for more in (
        '{"step": 2, "train_loss": 4.45, "train_runtime": 9.5}',
        '{"step": 2, "train_loss": 4.45}',
        '{"step": 2, "split": "valid", "loss": 9.0}',
        '{"step": 2, "split": "Test", "loss": 9.0}',
    ):
        path.write_text(steps + more + "\n")
        assert read_logs.read_log(path).steps == expected
    path.write_text(
        '{"step": 1, "train_loss": 2.5}\n{"step": 2, "train_loss": 2.25, "split": "train"}\n'
    )  # without others: of steps
    assert read_logs.read_log(path).steps == expected
    path.write_text('{"step": 2, "train_loss": 4.45, "train_runtime": 9.5}\n')
    with pytest.raises(UserError, match="no training loss"):
        read_logs.read_log(path)


def test_json_that_says_a_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "loss": 2.5, "ms_per_iteration": 3}\n')
    assert len(read_logs.read_log(path).steps) == 1
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "loss": 2.25}\n')
    with pytest.raises(UserError, match="line 2 repeats step 1 with another loss"):
        read_logs.read_log(path)
    path.write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.5}\n{"step": 1, "loss": 2.25}\n'
    )  # resumed
    assert read_logs.read_log(path).steps == (LoggedStep(1, loss=2.25),)


def test_a_loss_of_null_is_a_step_without_a_loss(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2.0}\n'
    )
    curve = read_logs.read_log(tmp_path / "log.jsonl")
    assert [step.loss for step in curve.steps] == [2.5, None, 2.0]
    with pytest.raises(UserError, match="at 2 iterations there is no loss"):
        align(curve, curve)


@pytest.mark.parametrize("line", ['{"step": 1, "loss": }', '{"step": 1, "step": 2}', "[1]"])
def test_json_that_cannot_be_used_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        read_logs.read_log(tmp_path / "log.jsonl")


# --- TensorBoard


@pytest.fixture
def board(tmp_path):
    """Writes scalars by TensorBoard's own writer."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def write(*scalars: tuple[str, float, int], folder: str = "events") -> str:
        writer = EventFileWriter(str(tmp_path / folder))
        for tag, value, step in scalars:
            writer.add_event(
                Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
            )
        writer.close()
        return str(tmp_path / folder)

    return write


def test_our_events(tmp_path):
    with metrics_log.MetricsLogger(0, None, tmp_path) as logger:
        for i in (1, 2):
            logger.line(metric_lines.parse_line(ours(i, 2.0 + i, ms_per_iteration=12.5)))
            logger.line(metric_lines.EvalLine(i, 9.0))
    curve = read_logs.read_log(tmp_path)
    assert curve.steps == tuple(LoggedStep(i, 8 * i, 128 * i, 2.0 + i, 1.0, ms=12.5) for i in (1, 2))
    assert read_logs.read_log(next(tmp_path.iterdir())).steps == curve.steps


def test_megatrons_events_resumed(board):
    lines = []
    for i, loss in ((1, 3.0), (2, 2.5), (1, 3.5), (2, 2.25)):
        for tag, value, x in (
            ("loss", 99.0, i),
            ("lm loss", loss, i),
            ("lm loss vs samples", loss, 8 * i),
            ("grad-norm", 0.5, i),
        ):
            lines.append((tag, value, x))
        lines.append(("lm loss validation", 7.0, i))
    curve = read_logs.read_log(board(*lines))
    assert curve.steps[-1] == LoggedStep(2, 16, None, 2.25, 0.5)
    assert (len(curve.steps), curve.replaced) == (2, 2)


@pytest.mark.parametrize(
    ("tag", "x", "step"),
    [
        ("lm-loss-training/lm loss", 3, LoggedStep(3, loss=2.5)),
        ("lm-loss-training/lm loss vs tokens", 384, LoggedStep(tokens=384, loss=2.5)),
        ("Train/Samples/train_loss", 24, LoggedStep(samples=24, loss=2.5)),
    ],
)
def test_others_events(board, tag, x, step):
    assert read_logs.read_log(board((tag, 2.5, x), ("eval/loss", 9.0, x))).steps == (step,)


def test_events_without_a_loss(board):
    with pytest.raises(UserError, match="no loss under a known name"):
        read_logs.read_log(board(("learning rate", 1.0, 1), ("lm loss validation", 2.0, 1)))


def test_events_that_are_cut_off(board, tmp_path):
    from pathlib import Path

    path = next(Path(board(*(("lm loss", float(i), i) for i in range(1, 9)))).iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    assert [step.iteration for step in read_logs.read_log(path).steps] == list(range(1, 8))


# --- what is no log


def test_what_is_no_log_is_named(tmp_path):
    (tmp_path / "deepspeed.log").write_text(NOISE)
    (tmp_path / "empty.log").write_text("")
    (tmp_path / "utf16.log").write_text(ours(1, 2.0), encoding="utf-16")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("deepspeed.log", "no training loss in this log"),
        ("empty.log", "no training loss"),
        ("noise", "no training loss"),
        ("folder", "neither train.log, .* nor TensorBoard events"),
        ("nothing", "there is no such log"),
        ("utf16.log", "is UTF-16"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_logs.read_log(tmp_path / name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
