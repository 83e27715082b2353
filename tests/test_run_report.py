"""The page of a run: what it reads from the log, its curves, and how a browser shows it."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from ascendspeed.commands import report
from ascendspeed.run_report import page, svg_chart
from ascendspeed.run_report.run_log import parse, read_run
from ascendspeed.training.metric_lines import EvalLine, TrainLine, format_line
from ascendspeed.utils.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0"
)


def log_text(lr: float = 1e-3, count: int = 120) -> str:
    lines = [
        "start: 2026-11-30 12:00:00, host h, commit c: intern train",
        "device: cpu (X), gloo; 2 processes: TP 1 x DP 2",
        f'run: {{"optim": {{"lr": {lr}}}, "train": {{"save": "<b>ckpt</b>"}}}}',
    ]
    for i in range(1, count + 1):
        line = TrainLine(
            *("2026-11-30 12:00:00", i, 200),
            tokens=i * 512,
            tokens_per_s=1000.0 + i,
            lr=lr * (1 - i / 200),
            loss=5 / (1 + i / 20) + (i % 7) / 20,
            grad_norm=1.0 + i % 3,
            skipped=int(i == 50),
            memory_gib=1.5,
        )
        lines.append(format_line(line))
        if i % 40 == 0:
            lines.append(format_line(EvalLine(i, 5 / (1 + i / 20))))
    lines += [
        " iteration 50 skipped, nothing was updated: loss nan; rank 1: samples 8-9; loss scale 1",
        "warning: iteration 70: the loss 9.0000 is a spike, 12 deviations above the median 3.0; samples 1-8",
        " saved ckpt/step_0000100 in 2.5 s, of which training stood still for 0.3 s",
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture
def logs(tmp_path):
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.log").write_text(log_text(lr))
    return tmp_path


def test_reads_the_log(logs):
    run = read_run(logs / "a")
    assert [line.iteration for line in run.train] == [*range(1, 121)]
    assert [(event.iteration, event.kind) for event in run.events] == [(50, "skipped"), (70, "spike")]
    assert "samples 8-9" in run.events[0].text
    assert (run.checkpoints[0].seconds, run.checkpoints[0].stall) == (2.5, 0.3)
    assert run.settings["optim.lr"] == 1e-3
    assert len(run.evaluations) == 3


def test_a_resumed_run_replaces_what_it_repeats(logs):
    repeated = [format_line(TrainLine("2026-11-30 13:00:00", i, 200, loss=7.0)) for i in (41, 42)]
    run = parse(logs / "a" / "train.log", [*log_text().splitlines(), *repeated])
    assert [line.iteration for line in run.train] == [*range(1, 43)]
    assert [line.iteration for line in run.evaluations] == [40]
    assert run.train[-1].loss == 7.0


def test_page(logs):
    text = page.render(read_run(logs / "a"))
    assert text.count("<svg") == 5  # loss, learning rate, gradient norm, tokens/s, memory
    assert "rank 1: samples 8-9" in text
    assert "ckpt/step_0000100" in text
    assert "&lt;b&gt;ckpt" in text
    assert "<b>ckpt" not in text
    assert "stopped at iteration 120 of 200" in text
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)  # self-contained
    assert "http-equiv" not in text
    assert 'http-equiv="refresh" content="30"' in page.render(read_run(logs / "a"), is_final=False)


def test_differences(logs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["intern report", str(logs / "a"), "--against", str(logs / "b")])
    assert report.main() == 0
    assert "optim.lr: 0.001 | 0.002" in capsys.readouterr().out
    text = (logs / "a" / "run-against.html").read_text()
    assert "training the other run" in text
    assert "train.save" not in text.partition("<details>")[0]  # equal
    equal = page.differences(read_run(logs / "a"), read_run(logs / "a"))
    assert equal == []


def test_not_a_run(tmp_path):
    (tmp_path / "train.log").write_text("hello\n")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"train\.log|none"):
            read_run(path)


def test_refreshes_while_the_run_goes_on(logs, monkeypatch):
    live = page.RunPage(logs / "a")
    path = logs / "a" / "run.html"
    live.write(EvalLine(1, 1.0))
    assert "running at iteration 120" in path.read_text()
    path.unlink()
    live.write(EvalLine(2, 1.0))
    assert not path.exists()  # too early
    live.close()
    assert "stopped at iteration 120" in path.read_text()


def test_smoothing_and_ticks():
    constant = [(i, 3.0) for i in range(5)]
    assert [y for _, y in svg_chart.smooth(constant)] == pytest.approx([3.0] * 5)
    values = [y for _, y in svg_chart.smooth([(0, 0.0), (1, 1.0)], share=0.5)]
    assert values == pytest.approx([0.0, 2 / 3])  # by hand: (0.5 * 0 + 0.5 * 1) / (1 - 0.5 ** 2)
    assert svg_chart.ticks(0, 10) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert svg_chart.ticks(0.13, 0.28) == pytest.approx([0.15, 0.2, 0.25])
    assert svg_chart.ticks(1, 1) == [1]
    assert svg_chart.draw_chart("x", [svg_chart.Series("", [(1, float("nan"))])]) == ""


def test_a_constant_curve_is_in_the_middle():
    def heights(*values):
        drawn = svg_chart.draw_chart("x", [svg_chart.Series("", list(enumerate(values)))])
        return [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", drawn)]

    top, bottom = svg_chart.TOP, svg_chart.HEIGHT - svg_chart.BOTTOM
    assert heights(3.0, 3.0) == [(top + bottom) / 2] * 2
    assert heights(0.0, 0.0) == [(top + bottom) / 2] * 2
    assert heights(3.0, 4.0) == [bottom, top]  # control


def browser(url: str, folder, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [CHROMIUM, *QUIET.split(), f"--user-data-dir={folder}", *flags, url],
        capture_output=True,
        text=True,
        timeout=120,
    )


def console_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
def test_a_browser_shows_the_curves(logs, tmp_path):
    """The pixels have the colors of the curves, and the console has no message."""
    from matplotlib.image import imread

    broken = tmp_path / "broken.html"
    page.write_page(tmp_path / "run.html", read_run(logs / "a"))
    broken.write_text("<script>console.error('mistake')</script><p>no curve</p>")
    colors = {}
    for name in ("run", "broken"):
        picture = tmp_path / f"{name}.png"
        flags = (f"--screenshot={picture}", "--window-size=1100,1400", "--hide-scrollbars")
        done = browser(f"file://{tmp_path}/{name}.html", tmp_path / f"data-{name}", *flags)
        assert picture.exists(), done.stderr[-500:]
        pixels = (imread(picture)[..., :3] * 255).round().astype(int)
        colors[name] = (abs(pixels - [0x1F, 0x77, 0xB4]).sum(axis=-1) < 12).sum()
        assert bool(console_lines(done.stderr)) == (name == "broken")
    assert colors["run"] > 1000
    assert colors["broken"] == 0  # control


@pytest.mark.slow
def test_a_training_run_leaves_its_page(tmp_path):
    from helpers import launch, tiny_run

    launch.must("pretrain_intern.py", *tiny_run.flags(tmp_path, 3), "--report-to", "tensorboard")
    assert "finished at iteration 3 of 3" in (tmp_path / "logs" / "run.html").read_text()
    assert len((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()) == 3
    assert list((tmp_path / "logs" / "tensorboard").glob("events*"))


def test_lines_without_numbers_are_left_out():
    line = TrainLine("2026-11-30 12:00:00", 1, 2)
    run = parse(page.TEMPLATE, [format_line(replace(line, iteration=i)) for i in (1, 2)])
    assert page.render(run).count("<svg") == 0
