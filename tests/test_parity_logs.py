"""Logs of other programs, as their lines really look, read into one form; and those of ours, resumed, torn and appended to."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.loss_compare import console_logs, read_logs
from ascendspeed.loss_compare.align import align
from ascendspeed.loss_compare.curve import Digits, Step, continuous, number, step_of
from ascendspeed.training import metrics_log
from ascendspeed.utils.errors import UserError

SAMPLES = {  # real lines, as published in manuals, issues and READMEs -> what they say
    "Megatron-LM without a time": (
        " iteration      182/  250000 | consumed samples:       186368 | elapsed time per iteration (ms): 126995.3 | learning rate: "
        "1.365E-05 | global batch size:  1024 | lm loss: 2.382640E+00 | loss scale: 1.0 | grad norm: 0.227 | number of skipped "
        "iterations:   0 | number of nan iterations:   0 |",
        Step(182, 186368, None, 2.38264, 0.227, 0, 0, 250000, 1024, None, 126995.3),
    ),
    "Megatron-LM behind a launcher": (
        "[default0]: [2025-05-27 15:23:07] iteration        1/    24000 | consumed samples:          1024 | elapsed time per iteration "
        "(ms): 271607.0 | throughput per GPU (TFLOP/s/GPU): 40.4 | learning rate: 1.500000E-06 | global batch size:  1024 | lm loss: "
        "1.192634E+01 | load_balancing_loss: 1.041994E+00 | loss scale: 1.0 | grad norm: 5.960 | num zeros: 0.0 | params norm: 238.330 "
        "| number of skipped iterations:    0 | number of nan iterations:    0 |",
        Step(1, 1024, None, 11.92634, 5.96, 0, 0, 24000, 1024, None, 271607.0, tflops=40.4),
    ),
    "AscendSpeed": (
        " iteration  3/50000 | consumed samples: 768 | consumed tokens:  1572864 | elapsed time per iteration (ms):  33818.0 | learning "
        "rate:    1.406E-07 | gloabl batch size:  256 | lm loss:  1.200820E+01 | loss scale:  1.0 | grad norm:    9.216 | actual "
        "seqlen:  2048 | number of skipped iterations: 0 | number of nan iterations:   0 | samples per second: 7.570 | TFLOPs: 107.09 |",
        Step(3, 768, 1572864, 12.0082, 9.216, 0, 0, 50000, 256, 2048, 33818.0, 7.57, None, 107.09),
    ),
    "ModelLink, words behind the last bar": (
        " iteration     1665/    5000 | consumed samples:      3409920 | consumed tokens:  13967032320 | elapsed time per iteration (ms): "
        "23205.2 | learning rate: 7.762E-05 | global batch size:  2048 | lm loss: 1.993132E+00 | loss scale: 16384.0 | grad norm: 2.486 "
        "| actual seqlen:  4096 | number of skipped iterations:   0 | number of nan iterations:   0 | samples per second: 88.256 | "
        "TFLOPs: 148.25 | tgs (tokens/gpu/second): 353.02 time (ms)",
        Step(
            1665, 3409920, 13967032320, 1.993132, 2.486, 0, 0, 5000, 2048, 4096, 23205.2, 88.256, None, 148.25
        ),
    ),
    "Megatron-DeepSpeed, seconds": (
        " [default7]: iteration    12695/  115311 | consumed samples:      9841584 | consumed tokens:  20155564032 | elapsed time per "
        "iteration (s): 105.22 | learning rate: 5.969E-05 | global batch size:  2048 | lm loss: 2.463556E+00 | grad norm: 0.174 | num "
        "zeros: 0.0 | number of skipped iterations:   0 | number of nan iterations:   0 | samples per second: 19.463 | TFLOPs: 149.02 |",
        Step(
            12695,
            9841584,
            20155564032,
            2.463556,
            0.174,
            0,
            0,
            115311,
            2048,
            None,
            105220.0,
            19.463,
            None,
            149.02,
        ),
    ),
    "Megatron-DeepSpeed, tokens per device": (
        " iteration      199/  317892 | consumed samples:       152832 | consumed tokens:    625999872 | elapsed time per iteration (ms): "
        "14287.5 | learning rate: 2.407E-04 | global batch size:   768 | lm loss: 5.905366E+00 | loss scale: 8192.0 | actual seqlen:  "
        "4096 | number of skipped iterations:   0 | number of nan iterations:   0 | samples per second: 53.753 | tokens per gpu per "
        "second (tgs): 1146.733 | TFLOPs: 69.85 |",
        Step(
            199, 152832, 625999872, 5.905366, None, 0, 0, 317892, 768, 4096, 14287.5, 53.753, 1146.733, 69.85
        ),
    ),
    "tokens that cannot be relied on": (
        "3:  [2026-05-29 03:52:45] iteration      300/     300 | consumed samples:       307200 | consumed tokens: 1.258B | elapsed time "
        "per iteration (ms): 131064.1 | eta: 0:00:00 | tokens/sec/gpu: 8000.5 | throughput per GPU (TFLOP/s/GPU): 412.3 | learning rate: "
        "1.100000E-05 | global batch size:  1024 | lm loss: 1.504590E+00 | grad norm: 0.623 | number of skipped iterations:   0 | ",
        Step(300, 307200, None, 1.50459, 0.623, 0, None, 300, 1024, None, 131064.1, None, 8000.5, 412.3),
    ),
    "GPT-NeoX": (
        " samples/sec: 7.799 | iteration       34/   10000 | elapsed time per iteration (ms): 4103.1 | learning rate: 2.111E-06 | approx "
        "flops per GPU: 112.9TFLOPS | lm_loss: 1.118665E+01 | number of skipped iterations:   0 | number of nan iterations:   0 |",
        Step(34, None, None, 11.18665, None, 0, 0, 10000, None, None, 4103.1, 7.799, None, 112.9),
    ),
    "MindSpeed-MM": (
        "[Rank 0 | Local Rank 0] 2026-01-01 00:00:00 INFO [train_engine:48] => iteration        1/     100 | consumed samples:            8 "
        "| elapsed time per iteration (ms): 7137.9 | learning rate: 1.0E-05 | global batch size:     8 | loss: 1.924620E+00 | grad norm: "
        "134.300 |",
        Step(1, 8, None, 1.92462, 134.3, None, None, 100, 8, None, 7137.9),
    ),
    "InternEvo, commas": (
        "2023-07-07 12:28:57,802\tINFO train.py:323 in record_current_batch_training_metrics -- tflops=63.27010355651958,step=0,"
        "loss=11.634403228759766,tgs (tokens/gpu/second)=1424.64,lr=4.0000000000000003e-07,loss_scale=65536.0,"
        "grad_norm=63.672620777841004,micro_num=4,num_consumed_tokens=131072,inf_nan_skip_batches=0,num_samples_in_batch=19,"
        "largest_length=2048,largest_batch=5,smallest_batch=4,adam_beta2=0.95,fwd_bwd_time=6.48",
        Step(
            0,
            None,
            131072,
            11.634403228759766,
            63.672620777841004,
            0,
            tokens_per_s=1424.64,
            tflops=63.27010355651958,
        ),
    ),
    "InternEvo, blanks and norms of groups": (
        "2024-03-21 14:48:31,587      INFO training_internlm.py:599 in record_current_batch_training_metrics -- tflops=186.62 step=1 "
        "loss=11.63248062133789 tgs (tokens/gpu/second)=3917.95 tgs/last_tgs_1=3917.97 tgs/tgs_all=3262.85 lr=6.000000000000001e-07 "
        "loss_scale=65536.0 grad_norm={'0_default': 3.0, '1_fp32': 4.0} micro_num=4 num_consumed_tokens=262144 inf_nan_skip_batches=0 "
        "num_samples_in_batch=8 acc=0.0 perplexity=111859.625 acc/en=0.0 loss_from_metric=11.6199 loss/en=11.6199",
        Step(1, None, 262144, 11.63248062133789, 5.0, 0, tokens_per_s=3917.95, tflops=186.62),
    ),
    "DeepSpeed's pipeline engine": (
        "steps: 200 loss: 5.5508 lm loss: 5.5103 moe loss: 0.0405 iter time (s): 0.936 samples/sec: 136.706",
        Step(200, None, None, 5.5103, ms=936.0, samples_per_s=136.706),
    ),
}
NOISE = """\
[2024-03-07 15:27:02,646] [INFO] [timer.py:260:stop] epoch=0/micro_step=199/global_step=199, RunningAvgSamplesPerSec=58.7
[2024-03-07 15:27:15,063] [INFO] [logging.py:96:log_dist] [Rank 0] step=200, skipped=4, lr=[0.00024], mom=[(0.9, 0.999)]
time (ms) | forward: 659.86 | backward: 2164.69 | optimizer: 1172.51 | batch generator: 0.83
 validation loss at iteration 100 | lm loss value: 2.345678E+00 | lm loss PPL: 1.044E+01 |
(min, max) time across ranks (ms):
"""


def ours(iteration: int, loss: float | None, **more: float) -> str:
    """A line of this project's log; 8 samples of 16 tokens an iteration."""
    places = {"samples": 8 * iteration, "tokens": 128 * iteration}
    return (
        metrics_log.format(
            metrics_log.TrainLine(
                "2026-01-01 00:00:00", iteration, 100, **places, loss=loss, **{"grad_norm": 1.0, **more}
            )
        )
        + "\n"
    )


@pytest.mark.parametrize(("line", "step"), SAMPLES.values(), ids=SAMPLES.keys())
def test_real_lines(tmp_path, line, step):
    path = tmp_path / "their.log"
    path.write_text(NOISE + line + "\n" + NOISE)
    assert read_logs.read(path).steps == (step,)


def test_control_a_neighbour_of_the_loss_is_not_the_loss():
    """Labels are compared whole: with `in` instead, the first of these would be read."""
    line = " iteration 1/ 2 | moe lm loss: 9.0 | lm loss: 2.0 | lm loss value: 7.0 | mtp_1 loss: 3.0 |\n"
    assert console_logs.read("x", [line]).steps[0].loss == 2.0
    assert console_logs.read("x", [" iteration 1/ 2 | mtp_1 loss: 3.0 |\n"]).steps == ()


def test_lines_that_ran_into_each_other_are_none():
    assert (
        console_logs.read("x", [" iteration 1/ 2 | lm loss: 2.0 | iteration 2/ 2 | lm loss: 3.0 |\n"]).steps
        == ()
    )


@pytest.mark.parametrize("name", [name for name in SAMPLES if "DeepSpeed's" not in name])
def test_a_torn_line_gives_no_wrong_number(name):
    line, whole = SAMPLES[name]
    for cut in range(1, len(line)):
        for step in console_logs.read("x", [line[:cut]]).steps:
            for field, value in vars(step).items():
                assert value is None or value == getattr(whole, field), (line[:cut], field)


def test_settings_and_device(tmp_path):
    run = {"train": {"seed": 7}, "optim": {"lr": 1e-3}}
    said = "device: cpu (AMD EPYC), gloo; 4 processes: TP 2 x DP 2"
    (tmp_path / "train.log").write_text(f"{said}\nrun: {json.dumps(run)}\nrun: {{torn\n{ours(1, 2.5)}")
    curve = read_logs.read(tmp_path)
    assert (curve.config, curve.device, curve.digits["loss"]) == (run, said.removeprefix("device: "), 9)
    arguments = "0: ------------------------ arguments ------------------------\n0:   seq_length ...................................... 1024\n"
    curve = console_logs.read("x", [*arguments.splitlines(True), SAMPLES["AscendSpeed"][0] + "\n"])
    assert (curve.config, curve.digits) == ({"seq_length": "1024"}, {"loss": 7, "grad_norm": 4})


def test_run_json_beside_a_log_that_says_nothing(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (tmp_path / "run.json").write_text('{"train": {"seed": 7}}')
    assert read_logs.read(tmp_path / "x.jsonl").config == {"train": {"seed": 7}}


def test_a_resumed_run_replaces_what_was_done_beyond_its_checkpoint(tmp_path):
    lines = (
        [ours(i, float(i)) for i in (1, 2, 3, 4)] + ["half a li\n"] + [ours(i, i + 0.5) for i in (3, 4, 5)]
    )
    (tmp_path / "train.log").write_text("".join(lines))
    curve = read_logs.read(tmp_path)
    assert [step.loss for step in curve.steps] == [1.0, 2.0, 3.5, 4.5, 5.5]
    assert curve.replaced == 2


def test_a_run_begun_again_in_the_same_log_leaves_nothing_of_the_old_one():
    steps, replaced = continuous(
        [Step(i, loss=1.0) for i in range(1, 6)] + [Step(i, loss=2.0) for i in range(1, 4)]
    )
    assert ([step.iteration for step in steps], {step.loss for step in steps}, replaced) == (
        [1, 2, 3],
        {2.0},
        5,
    )


@given(st.lists(st.integers(0, 9)))
def test_continuous_always_grows_and_ends_with_the_last(places):
    steps, replaced = continuous(Step(place) for place in places)
    kept = [step.iteration for step in steps]
    assert kept == sorted(set(kept))
    assert kept[-1:] == places[-1:]
    assert len(kept) + replaced == len(places)


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
    assert number(text) == value


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
    seen = Digits()
    for text in texts:
        seen.count({"Grad-Norm": text})
    assert seen.found == {"grad_norm": digits}


def test_the_interval_of_a_line():
    assert console_logs.read("x", [ours(20, 2.0, interval=5)]).steps[0].interval == 5


def test_nan_is_read_as_nan():
    assert math.isnan(step_of({"step": 1, "loss": "nan"}).loss)


# --- JSON lines -------------------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"iteration": 1, "consumed_samples": 8, "lm loss": 2.5, "grad_norm": 1.25, "last": true}\n\n'
        '{"current_steps": 2, "total_steps": 9, "samples": 16, "loss": 2.25}\n{"step": 2, "eval_loss": 9}\n{"step": 3, "lo'
    )
    curve = read_logs.read(path)
    assert curve.steps == (Step(1, 8, loss=2.5, grad_norm=1.25), Step(2, 16, loss=2.25, train_iters=9))
    assert curve.kind == "JSON lines"
    path.write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.0, "grad_norm": Infinity}\n'
    )  # as Python writes them
    assert [math.isnan(step.loss) for step in read_logs.read(path).steps] == [True, False]


def test_json_that_is_of_no_step(tmp_path):
    """Hugging Face's last line, a mean over the whole run, says the last step once more; so do evaluations."""
    path = tmp_path / "log.jsonl"
    steps = '{"loss": 2.5, "step": 1}\n{"loss": 2.25, "step": 2}\n'
    wanted = (Step(1, loss=2.5), Step(2, loss=2.25))
    for more in (
        '{"step": 2, "train_loss": 4.45, "train_runtime": 9.5}',
        '{"step": 2, "train_loss": 4.45}',
        '{"step": 2, "split": "valid", "loss": 9.0}',
        '{"step": 2, "split": "Test", "loss": 9.0}',
    ):
        path.write_text(steps + more + "\n")
        assert read_logs.read(path).steps == wanted
    path.write_text(
        '{"step": 1, "train_loss": 2.5}\n{"step": 2, "train_loss": 2.25, "split": "train"}\n'
    )  # without others: of steps
    assert read_logs.read(path).steps == wanted
    path.write_text('{"step": 2, "train_loss": 4.45, "train_runtime": 9.5}\n')
    with pytest.raises(UserError, match="no training loss"):
        read_logs.read(path)


def test_json_that_says_a_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "loss": 2.5, "ms_per_iteration": 3}\n')
    assert len(read_logs.read(path).steps) == 1
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "loss": 2.25}\n')
    with pytest.raises(UserError, match="line 2 says step 1 once more"):
        read_logs.read(path)
    path.write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.5}\n{"step": 1, "loss": 2.25}\n'
    )  # resumed
    assert read_logs.read(path).steps == (Step(1, loss=2.25),)


def test_a_loss_of_null_is_a_step_without_a_loss(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2.0}\n'
    )
    curve = read_logs.read(tmp_path / "log.jsonl")
    assert [step.loss for step in curve.steps] == [2.5, None, 2.0]
    with pytest.raises(UserError, match="at 2 iterations there is no loss"):
        align(curve, curve)


@pytest.mark.parametrize("line", ['{"step": 1, "loss": }', '{"step": 1, "step": 2}', "[1]"])
def test_json_that_cannot_be_used_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 is no JSON"):
        read_logs.read(tmp_path / "log.jsonl")


# --- TensorBoard ------------------------------------------------------------------------------------------------------------


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
    with metrics_log.Logger(0, None, tmp_path) as logger:
        for i in (1, 2):
            logger.line(metrics_log.parse(ours(i, 2.0 + i, ms_per_iteration=12.5)))
            logger.line(metrics_log.EvalLine(i, 9.0))
    curve = read_logs.read(tmp_path)
    assert curve.steps == tuple(Step(i, 8 * i, 128 * i, 2.0 + i, 1.0, ms=12.5) for i in (1, 2))
    assert read_logs.read(next(tmp_path.iterdir())).steps == curve.steps


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
    curve = read_logs.read(board(*lines))
    assert curve.steps[-1] == Step(2, 16, None, 2.25, 0.5)
    assert (len(curve.steps), curve.replaced) == (2, 2)


@pytest.mark.parametrize(
    ("tag", "x", "step"),
    [
        ("lm-loss-training/lm loss", 3, Step(3, loss=2.5)),
        ("lm-loss-training/lm loss vs tokens", 384, Step(tokens=384, loss=2.5)),
        ("Train/Samples/train_loss", 24, Step(samples=24, loss=2.5)),
    ],
)
def test_others_events(board, tag, x, step):
    assert read_logs.read(board((tag, 2.5, x), ("eval/loss", 9.0, x))).steps == (step,)


def test_events_without_a_loss(board):
    with pytest.raises(UserError, match="no loss under a known name"):
        read_logs.read(board(("learning rate", 1.0, 1), ("lm loss validation", 2.0, 1)))


def test_events_that_are_cut_off(board, tmp_path):
    from pathlib import Path

    path = next(Path(board(*(("lm loss", float(i), i) for i in range(1, 9)))).iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    assert [step.iteration for step in read_logs.read(path).steps] == list(range(1, 8))


# --- what is no log ---------------------------------------------------------------------------------------------------------


def test_what_is_no_log_is_named(tmp_path):
    (tmp_path / "deepspeed.log").write_text(NOISE)
    (tmp_path / "empty.log").write_text("")
    (tmp_path / "utf16.log").write_text(ours(1, 2.0), encoding="utf-16")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    for name, said in (
        ("deepspeed.log", "no training loss in this log"),
        ("empty.log", "no training loss"),
        ("noise", "no training loss"),
        ("folder", "neither train.log nor TensorBoard events"),
        ("nothing", "there is no such log"),
        ("utf16.log", "is UTF-16"),
    ):
        with pytest.raises(UserError, match=said) as error:
            read_logs.read(tmp_path / name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
