"""The log line: what is written is what is read, an old Megatron line is read too, and a torn one is not."""

import logging
import math
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed.training import metric_lines, metrics_log
from ascendspeed.utils.errors import UserError

FULL = metric_lines.TrainLine(
    time="2026-11-21 12:00:00",
    iteration=10,
    train_iters=100,
    samples=2560,
    tokens=5242880,
    ms_per_iteration=1234.5,
    tokens_per_s=4000.0,
    tflops=171.125,
    mfu=0.5485,
    lr=1.5e-4,
    global_batch_size=256,
    loss=6.12345678,
    interval=10,
    loss_scale=1.0,
    grad_norm=1.234,
    skipped=0,
    nans=0,
    memory_gib=12.34,
    seconds_left=93784,
)
FULL_TEXT = (
    " [2026-11-21 12:00:00] iteration       10/     100 | consumed samples:         2560 | consumed tokens:  "
    "      5242880 |"
    " elapsed time per iteration (ms): 1234.5 | tokens/s/device: 4000.0 | TFLOP/s/device: 171.125 | MFU: "
    "54.85% |"
    " learning rate: 1.500000E-04 | global batch size:   256 | lm loss: 6.12345678E+00 | iterations in "
    "interval:  10 |"
    " loss scale: 1.0 | grad norm: 1.23400000E+00 |"
    " number of skipped iterations:   0 | number of nan iterations:   0 | memory: 12.34 GiB | time left: "
    "26:03:04 |"
)
MEGATRON = (
    " [2024-03-01 08:00:00.123456] iteration      100/  500000 | consumed samples:        25600 | elapsed "
    "time per iteration (ms):"
    " 19684.6 | throughput per GPU (TFLOP/s/GPU): 145.7 | learning rate: 1.500000E-05 | global batch size:   "
    "256 |"
    " lm loss: 7.654321E+00 | loss scale: 1.0 | grad norm: 2.345 | num zeros: 0 | number of skipped "
    "iterations:   0 |"
    " number of nan iterations:   1 | "
)

count, number = st.integers(0, 10**15), st.floats(0, 1e12)
lines = st.builds(
    metric_lines.TrainLine,
    time=st.datetimes().map(lambda t: t.replace(year=2026).strftime("%Y-%m-%d %H:%M:%S")),
    iteration=st.integers(0, 10**9),
    train_iters=st.integers(0, 10**9),
    samples=st.none() | count,
    tokens=st.none() | count,
    ms_per_iteration=st.none() | number,
    tokens_per_s=st.none() | number,
    tflops=st.none() | number,
    mfu=st.none() | st.floats(0, 2),
    lr=st.none() | st.floats(0, 1),
    global_batch_size=st.none() | count,
    loss=st.none() | st.floats(width=32),
    interval=st.none() | count,
    loss_scale=st.none() | st.sampled_from([1.0, 65536.0, 524288.0, 2.0**-3]),
    grad_norm=st.none() | st.floats(min_value=0),
    skipped=st.none() | count,
    nans=st.none() | count,
    memory_gib=st.none() | st.floats(0, 2000),
    seconds_left=st.none() | st.integers(0, 10**9),
)


def test_the_line_as_it_looks():
    assert metric_lines.format_line(FULL) == FULL_TEXT
    assert metric_lines.parse_line(FULL_TEXT) == FULL


@settings(max_examples=300)
@given(lines)
def test_round_trip(line):
    read = metric_lines.parse_line(metric_lines.format_line(line))
    assert metric_lines.format_line(read) == metric_lines.format_line(line)
    whole = (
        "iteration",
        "train_iters",
        "samples",
        "tokens",
        "global_batch_size",
        "interval",
        "skipped",
        "nans",
        "seconds_left",
    )
    for name in (*whole, "time"):
        assert getattr(read, name) == getattr(line, name)
    unknown = {f.name for f in metric_lines.FIELDS if getattr(line, f.name) is None}
    assert unknown == {f.name for f in metric_lines.FIELDS if getattr(read, f.name) is None}


@given(st.floats(width=32, allow_nan=False))
def test_an_fp32_number_comes_back_bit_for_bit(number):
    line = metric_lines.parse_line(
        metric_lines.format_line(
            metric_lines.TrainLine("2026-11-21 12:00:00", 1, 2, loss=number, grad_norm=number)
        )
    )
    assert struct.pack("f", line.loss) == struct.pack("f", line.grad_norm) == struct.pack("f", number)


def test_lines_of_older_logs_are_read():
    """The gradient norm with six decimals, and nothing about the interval."""
    old = FULL_TEXT.replace("1.23400000E+00", "1.234000").replace(" iterations in interval:  10 |", "")
    assert metric_lines.parse_line(old) == replace(FULL, interval=None)


def test_control_eight_digits_would_lose_bits():
    a, b = (struct.unpack("f", struct.pack("I", 0x40C3F35D + i))[0] for i in range(2))
    assert f"{a:.5E}" == f"{b:.5E}"  # Megatron's own format
    assert metric_lines.format_line(metric_lines.EvalLine(1, a)) != metric_lines.format_line(
        metric_lines.EvalLine(1, b)
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_not_a_number(loss):
    assert str(
        metric_lines.parse_line(
            metric_lines.format_line(metric_lines.TrainLine("2026-11-21 12:00:00", 1, 2, loss=loss))
        ).loss
    ) == str(loss)
    assert str(metric_lines.parse_line(metric_lines.format_line(metric_lines.EvalLine(1, loss))).loss) == str(
        loss
    )


@given(st.integers(0, 10**9), st.floats(0, 1e6), st.sampled_from(["validation", "test"]))
def test_eval_line(iteration, loss, split):
    text = metric_lines.format_line(metric_lines.EvalLine(iteration, loss, split))
    assert text.startswith(f" {split} loss at iteration {iteration} | lm loss value: ")
    read = metric_lines.parse_line(text)
    assert (read.iteration, read.split) == (iteration, split)
    assert read.loss == pytest.approx(loss, rel=1e-8)


def test_megatrons_own_line():
    line = metric_lines.parse_line(MEGATRON)
    assert (line.iteration, line.train_iters, line.samples, line.loss, line.nans) == (
        100,
        500000,
        25600,
        7.654321,
        1,
    )
    assert line.tokens is None


def test_a_launcher_may_prefix_it():
    assert metric_lines.parse_line("worker-1: " + FULL_TEXT + "\n") == FULL


def test_a_torn_line_gives_no_wrong_number():
    for cut in range(1, len(FULL_TEXT)):
        line = metric_lines.parse_line(FULL_TEXT[:-cut])
        if line is not None:  # torn at a bar: the shown part is right
            assert all(getattr(line, f.name) in (None, getattr(FULL, f.name)) for f in metric_lines.FIELDS)
            assert (line.iteration, line.train_iters) == (10, 100)


@pytest.mark.parametrize(
    "text", ["", "hello", "lm loss: 3", FULL_TEXT.replace("6.12345678E+00", "6.1.2"), "iteration 3/ 4 |"]
)
def test_other_text_is_no_line(text):
    assert metric_lines.parse_line(text) is None


def test_logger_appends_once_and_whole(tmp_path, capsys):
    with metrics_log.MetricsLogger(0, tmp_path / "logs") as first:
        first.say("hello")
        first.line(FULL)
    (tmp_path / "logs/train.log").open("a").write("half a li")  # a killed run
    with (
        metrics_log.MetricsLogger(0, tmp_path / "logs") as second,
        metrics_log.MetricsLogger(1, tmp_path / "logs") as other,
    ):
        second.line(metric_lines.EvalLine(10, 6.2))
        other.say("not rank 0")
    text = (tmp_path / "logs/train.log").read_text()
    assert (
        text == f"hello\n{FULL_TEXT}\nhalf a li\n{metric_lines.format_line(metric_lines.EvalLine(10, 6.2))}\n"
    )
    assert (
        capsys.readouterr().out
        == f"hello\n{FULL_TEXT}\n{metric_lines.format_line(metric_lines.EvalLine(10, 6.2))}\n"
    )
    assert list(metric_lines.read_lines(tmp_path / "logs/train.log")) == [
        FULL,
        metric_lines.EvalLine(10, 6.2),
    ]


def test_logger_is_line_buffered(tmp_path):
    logger = metrics_log.MetricsLogger(0, tmp_path)
    logger.say("seen at once")
    assert (tmp_path / "train.log").read_text() == "seen at once\n"
    logger.close()


def test_a_full_disk_does_not_stop_the_run(capsys):
    logger = metrics_log.MetricsLogger(0)
    logger._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    logger.say("one")
    logger.say("two")
    out = capsys.readouterr().out
    assert out.count("warning") == 1
    assert "No space left" in out
    assert "two" in out


def test_a_full_disk_under_stdout_does_not_stop_the_run(tmp_path):
    """In a process of its own, whose exit code would tell of it too."""
    code = (
        "from ascendspeed.training import metrics_log\n"
        f"with metrics_log.MetricsLogger(0, {str(tmp_path)!r}) as l:\n"
        "  l.say('one')\n  l.say('two')\nprint(1)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    warning = "warning: stdout: No space left on device; no more is written there\n"
    assert (done.returncode, done.stderr) == (0, warning)
    assert (tmp_path / "train.log").read_text() == f"{warning}one\ntwo\n"


OTHER_THREAD = "Exception in thread other"
LIMITED = """
import resource, signal, sys, threading
from ascendspeed.training import metric_lines, metrics_log
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with metrics_log.MetricsLogger(0, None, sys.argv[1]) as all:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    while all._board:
        all.line(metric_lines.EvalLine(1, 6.2))
    other = threading.Thread(target=lambda: 1 / 0, name="other")
    other.start()
    other.join()
    all.say("goes on")
"""


@pytest.mark.slow
def test_a_full_disk_under_tensorboard_does_not_stop_the_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr.partition(OTHER_THREAD)[0]
    assert OTHER_THREAD in done.stderr  # control: other threads report as before
    assert done.stdout.count("warning: --tensorboard-dir: File too large; no more is written there\n") == 1
    assert done.stdout.endswith("goes on\n")


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --log-dir"):
        metrics_log.MetricsLogger(0, tmp_path / "file")
    with pytest.raises(UserError, match="cannot read"):
        list(metric_lines.read_lines(tmp_path / "nothing"))


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with metrics_log.MetricsLogger(0, None, tmp_path) as logger:
        logger.line(FULL)
        logger.line(metric_lines.EvalLine(10, 6.2))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("lm loss")[0].value == pytest.approx(FULL.loss)
    assert events.Scalars("lm loss validation")[0].step == 10


@pytest.mark.parametrize("columns", [60, 80, 100, 119])
def test_the_line_of_a_narrow_terminal(columns):
    """It fits, and loss and iteration are those of the full line, to the last bit."""
    text = metric_lines.compact_line(FULL, columns)
    assert len(text) <= columns
    fields, whole = metric_lines.split_fields(text), metric_lines.split_fields(FULL_TEXT)
    assert fields["lm loss"] == whole["lm loss"]
    assert (fields["iteration"], fields["train iters"]) == ("10", "100")
    labels = fields.keys() & {field.label for field in metric_lines.FIELDS}
    assert all(fields[label] == whole[label] for label in labels)
    assert ("time left" in fields) == (columns > 60)


def test_a_narrow_terminal_shows_skipped_iterations_first():
    text = metric_lines.compact_line(replace(FULL, skipped=2, nans=1), 110)
    assert "number of skipped iterations: 2 | number of nan iterations: 1 |" in text
    assert "skipped" not in metric_lines.compact_line(FULL, 1000)


@pytest.mark.parametrize(("is_terminal", "columns"), [(True, 80), (True, 200), (False, 80)])
def test_a_terminal_gets_the_compact_line_and_the_file_the_whole_one(
    is_terminal, columns, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(metrics_log, "_is_terminal", lambda: is_terminal)
    with metrics_log.MetricsLogger(0, tmp_path, start_line="start: now") as log:
        log.line(FULL)
        logging.getLogger("ascendspeed").info("run: {long}", extra={"terminal": "run: short"})
    assert (tmp_path / "train.log").read_text() == f"start: now\n{FULL_TEXT}\nrun: {{long}}\n"
    line = metric_lines.compact_line(FULL, columns) if is_terminal and columns < 120 else FULL_TEXT
    assert capsys.readouterr().out == f"{line}\n{'run: short' if is_terminal else 'run: {long}'}\n"


def test_without_a_file_a_terminal_gets_everything(monkeypatch, capsys):
    monkeypatch.setattr(metrics_log, "_is_terminal", lambda: True)
    metrics_log.MetricsLogger(0).say("all of it", "short")
    assert capsys.readouterr().out == "all of it\n"
