"""Performance table: cells by hand, the published rows and their errors, incomplete logs."""

import json
import re
import runpy
import sys
from dataclasses import asdict

import pytest
from helpers import launch
from helpers.loss_curves import example_run
from helpers.training_logs import SAMPLES, ours

from ascendspeed.loss_compare import console_logs, performance_table, read_logs
from ascendspeed.loss_compare.performance_table import PUBLISHED, PerformanceRow
from ascendspeed.models import estimates, families
from ascendspeed.utils.errors import UserError


def write_log(
    folder,
    times=(9000.0, 1000.0, 500.0, 400.0, 600.0),
    device="cpu (AMD EPYC), gloo; 4 processes: TP 2 x DP 2",
) -> str:
    """A log of 8 samples of 16 tokens an iteration on 4 devices."""
    speeds = (
        {
            "ms_per_iteration": ms,
            "tokens_per_s": 8 * 16 * 1e3 / ms / 4,
            "tflops": 100 / ms,
            "global_batch_size": 8,
        }
        for ms in times
    )
    head = f"device: {device}\nrun: {json.dumps(asdict(example_run()))}\n"
    folder.mkdir(exist_ok=True)
    (folder / "train.log").write_text(
        head + "".join(ours(i, 2.0, **more) for i, more in enumerate(speeds, 1))
    )
    return str(folder)


def test_every_cell_by_hand(tmp_path):
    row = performance_table.performance_row(read_logs.read_log(write_log(tmp_path)), warmup=2)
    assert row == PerformanceRow(
        "cpu (AMD EPYC) (4)", "internlm-tiny", 100, 4.0, 64.0, 0.5, 0.2
    )  # median 500 ms: 16 samples/s over 4 devices
    assert row.cells == ("cpu (AMD EPYC) (4)", "internlm-tiny", "100", "4.000", "64", "0.500", "0.2")


def test_control_the_first_steps_do_not_count(tmp_path):
    curve = read_logs.read_log(write_log(tmp_path, (90000.0, 90000.0, 90000.0, 500.0, 500.0)))
    assert performance_table.performance_row(curve, warmup=3).seconds == 0.5
    assert performance_table.performance_row(curve, warmup=0).seconds == 90.0
    assert (
        performance_table.performance_row(curve, warmup=9).seconds == 90.0
    )  # a log that is shorter counts as a whole


def row_of(name: str, devices: int | None = None) -> PerformanceRow:
    return performance_table.performance_row(
        console_logs.parse_console_log(f"{name}.log", [SAMPLES[name][0] + "\n"]), devices
    )


def test_logs_of_others():
    row = row_of("AscendSpeed", 8)  # 7.570 samples/s of 2048 tokens on 8 devices
    assert (row.iterations, row.seconds, row.tflops) == (50000, 33.818, 107.09)
    assert row.samples == pytest.approx(7.57 / 8)
    assert row.tokens == pytest.approx(7.57 / 8 * 2048)
    assert (row.model, row.notes) == ("-", ())
    row = row_of("Megatron-DeepSpeed, tokens per device")  # says tokens per device itself
    assert row.tokens == 1146.733
    assert row.samples == pytest.approx(1146.733 / 4096)
    row = row_of("Megatron-LM without a time", 8)  # 1024 samples in 127 s
    assert row.samples == pytest.approx(1024 / 126.9953 / 8)
    assert row.tokens is None
    row = row_of("DeepSpeed's pipeline engine", 2)
    assert (row.samples, row.seconds, row.tokens) == (136.706 / 2, 0.936, None)
    assert row_of("InternEvo, commas").tokens == 1424.64


def test_what_a_log_does_not_say_is_not_guessed():
    row = row_of("AscendSpeed")
    assert (row.samples, row.tokens, row.seconds) == (None, None, 33.818)
    assert row.notes == ("AscendSpeed.log does not say how many devices there were: --devices N.",)
    assert row.cells[3:5] == ("-", "-")


def test_what_is_missing_is_what_the_footnote_names(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1, "loss": 2.0, "elapsed_time_ms": 500.0}\n')
    curve = read_logs.read_log(tmp_path / "x.jsonl")
    path = tmp_path / "x.jsonl"
    assert performance_table.performance_row(curve, 7).notes == (
        f"{path} does not say its global batch size.",
    )
    assert performance_table.performance_row(curve).notes == (
        f"{path} does not say its global batch size and how many devices there were: --devices N.",
    )


def test_megatrons_arguments_name_model_and_devices():
    names = {"world_size": 32, "num_layers": 80, "hidden_size": 8192, "seq_length": 2048}
    lines = [f"  {name} ...................... {value}\n" for name, value in names.items()]
    row = performance_table.performance_row(
        console_logs.parse_console_log("x", [*lines, SAMPLES["Megatron-LM without a time"][0] + "\n"])
    )
    assert row.model == "80 layers x 8192"
    assert row.tokens == pytest.approx(1024 / 126.9953 / 32 * 2048)


def test_what_the_footnotes_say_of_the_published_figures():
    npu7, _, npu65, _ = PUBLISHED
    assert (
        pytest.approx(13.0, rel=1e-3) == 256 / 19.6846
    )  # so 13.000 samples/s are of all devices, and 19684.6 are milliseconds
    assert npu7.samples * 8 == 13.0
    assert npu7.samples * 2048 == 3328
    assert abs(3328 - npu7.tokens) > 380
    per_token = estimates.flops_per_token(families.preset("internlm-7b"), 2048)
    assert per_token == pytest.approx(43.0e9, rel=1e-3)
    assert round(per_token * 3328 / 1e12) == 143
    assert round(per_token * 2943 / 1e12) == 127
    assert pytest.approx(5.33, rel=1e-3) == 128 / 24
    assert npu65.samples * 2048 == pytest.approx(npu65.tokens, rel=0.01)  # the 65B row agrees with itself
    per_token = estimates.flops_per_token(families.preset("internlm-65b"), 2048)
    assert per_token * npu65.tokens / 1e12 == pytest.approx(npu65.tflops, rel=0.02)


@pytest.mark.parametrize("markdown", [True, False])
def test_the_table(markdown):
    text = performance_table.format_table(
        [PerformanceRow("x", "y", 1, 2.0, 3.0, 4.0, 5.0), *PUBLISHED], markdown
    )
    lines = text.splitlines()
    first = 2 if markdown else 3
    rows = lines[first : first + 5]
    assert [line.strip("| ").partition("  ")[0].partition(" [")[0] for line in rows] == [
        *("x", "published, 8 NPUs", "published, 8 A100", "published, 32 NPUs", "published reference")
    ]
    assert [re.findall(r"\[([\d,]+)\]", line) for line in rows] == [[], ["1,2"], ["3"], ["4"], []]
    notes = [note for row in PUBLISHED for note in row.notes]
    for number, note in enumerate(notes, 1):
        assert f"[{number}] {note}" in " ".join(text.split())
    assert f"[{len(notes) + 1}]" not in text
    if markdown:
        assert len({line.count("|") for line in lines[:7]}) == 1
        assert re.fullmatch(r"\|( -+ \|){2}( -+: \|){5}", lines[1])
        assert len({len(line) for line in lines[:2]}) == 1
    else:
        assert max(map(len, lines)) <= 80


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs perf_table.py; returns what it prints."""

    def go(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["perf_table.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(launch.ROOT / "tools/perf_table.py"), run_name="__main__")
        output = capsys.readouterr()
        assert (end.value.code or 0) == (2 if output.err else 0)
        return output.err or output.out

    return go


def test_the_tool(tool, tmp_path):
    log = write_log(tmp_path / "a")
    output = tool(log, log, "--warmup", 2, "--out", tmp_path / "t.md", "--markdown")
    assert (tmp_path / "t.md").read_text() == output
    cells = [cell.strip() for cell in output.splitlines()[2].strip("|").split("|")]
    assert cells == ["cpu (AMD EPYC) (4)", "internlm-tiny", "100", "4.000", "64", "0.500", "0.2"]
    assert "| 13.000" not in output
    assert "published, 8 NPUs" in output
    assert "ublished" not in tool(log, "--no-published")
    for words, error in (
        ((), "at least one LOG"),
        ((log, "--devices", 0), "at least 1"),
        ((tmp_path / "no",), "there is no such log"),
    ):
        assert tool(*words).startswith("error: ")
        assert error in tool(*words)


def test_numbers_that_are_not_there(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert performance_table.performance_row(read_logs.read_log(tmp_path / "x.jsonl")).cells == (
        "x.jsonl",
        "-",
        "-",
        "-",
        "-",
        "-",
        "-",
    )
    with pytest.raises(UserError):
        read_logs.read_log(tmp_path)
