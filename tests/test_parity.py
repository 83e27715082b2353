"""Metrics against numpy and by hand, verdicts with controls, refusals, and the report files."""

import base64
import hashlib
import html.parser
import json
import os
import re
import runpy
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from helpers import launch
from helpers.loss_curves import CURVE, losses, write_run
from helpers.training_logs import ours
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.loss_compare import compare as comparing
from ascendspeed.loss_compare import metrics, report
from ascendspeed.loss_compare.align import AlignedCurves, align
from ascendspeed.loss_compare.curve import LoggedStep, LossCurve
from ascendspeed.utils import atomic
from ascendspeed.utils.errors import UserError


def curve(losses, name="x", **more) -> LossCurve:
    return LossCurve(
        name, "made up", tuple(LoggedStep(i, 8 * i, loss=loss, **more) for i, loss in enumerate(losses, 1))
    )


def pair(ref, cand) -> AlignedCurves:
    return align(curve(ref, "REF"), curve(cand, "CAND"))


def judged(cand, profile, ref=CURVE) -> bool:
    return metrics.judge(metrics.compute_metrics(pair(ref, cand)), profile).passed


# --- figures


def test_figures_by_hand():
    ref, cand = [2.0, 4.0, 5.0, 1.0], [2.0, 4.2, 4.9, 1.0]  # e: 0, 0.05, 0.02, 0
    f = metrics.compute_metrics(pair(ref, cand))
    assert f.steps == 4
    assert f.mean == pytest.approx(0.07 / 4)
    assert f.p50 == pytest.approx(0.01)
    assert f.maximum == pytest.approx(0.05)
    assert f.worst_at == 16
    assert f.of_averages == pytest.approx(0.1 / 12)
    assert f.bias == pytest.approx((0.05 - 0.02) / 4)
    assert f.max_absolute == pytest.approx(0.2)
    assert (f.first_step, f.identical) == (0.0, 2)
    assert (f.grad_norm_mean, f.grad_norm_max) == (None, None)


def test_gradient_norms():
    norms = [(2.0, 2.0), (4.0, 5.0), (1.0, float("inf")), (None, 3.0)]
    ref, cand = (curve([1.0] * 4) for _ in range(2))
    ref = replace(
        ref, steps=tuple(replace(s, grad_norm=a) for s, (a, _) in zip(ref.steps, norms, strict=True))
    )
    cand = replace(
        cand, steps=tuple(replace(s, grad_norm=b) for s, (_, b) in zip(cand.steps, norms, strict=True))
    )
    f = metrics.compute_metrics(align(ref, cand))
    assert (f.grad_norm_mean, f.grad_norm_max, f.grad_norm_identical) == (0.125, 0.25, 1)


@given(st.lists(st.tuples(losses, losses), min_size=1, max_size=40))
def test_figures_against_numpy(both):
    ref, cand = (np.array(side) for side in zip(*both, strict=True))
    f = metrics.compute_metrics(pair(ref.tolist(), cand.tolist()))
    e = np.abs(cand - ref) / ref
    expected = {
        "steps": len(e),
        "mean": e.mean(),
        "p50": np.percentile(e, 50),
        "p99": np.percentile(e, 99),
        "maximum": e.max(),
        "worst_at": 8 * (int(e.argmax()) + 1),
        "of_averages": abs(cand.mean() - ref.mean()) / ref.mean(),
        "bias": ((cand - ref) / ref).mean(),
        "max_absolute": np.abs(cand - ref).max(),
        "share_below": (e < 0.02).mean(),
        "first_step": e[0],
        "grad_norm_mean": None,
        "grad_norm_max": None,
        "identical": int((ref == cand).sum()),
        "grad_norm_identical": None,
    }
    for name, value in asdict(f).items():
        assert value == (expected[name] and pytest.approx(expected[name], rel=1e-9, abs=1e-12)), name


@given(st.lists(st.tuples(losses, losses), min_size=1, max_size=40))
def test_what_holds_for_all_curves(both):
    ref, cand = (list(side) for side in zip(*both, strict=True))
    f = metrics.compute_metrics(pair(ref, cand))
    assert 0 <= f.p50 <= f.maximum
    assert 0 <= f.mean <= f.maximum * (1 + 1e-12)
    assert f.p99 <= f.maximum * (1 + 1e-12)
    assert abs(f.bias) <= f.mean * (1 + 1e-12)
    assert 0 <= f.share_below <= 1
    same = metrics.compute_metrics(pair(ref, ref))
    assert (same.mean, same.maximum, same.bias, same.max_absolute, same.identical) == (0, 0, 0, 0, len(ref))
    if metrics.judge(f, "strict").passed:
        assert metrics.judge(f, "published").passed
    if metrics.judge(f, "bitwise").passed:
        assert metrics.judge(f, "strict").passed


def test_a_loss_of_zero_divides_nothing():
    f = metrics.compute_metrics(pair([0.0, 1.0], [0.0, 1.0]))
    assert f.maximum == 0
    assert metrics.compute_metrics(pair([0.0], [1e-6])).maximum == 1.0  # denominator 1e-6


def test_every_figure_has_its_definition():
    assert list(metrics.metric_definitions()) == list(asdict(metrics.compute_metrics(pair(CURVE, CURVE))))
    assert metrics.metric_definitions()["p50"] == "Median of e."


# --- verdicts, and what must fail


def test_the_same_curve_passes_all():
    for profile in ("published", "strict", "bitwise"):
        assert judged(CURVE, profile)


def test_one_step_off_by_more_than_two_per_cent_fails_strict_only():
    off = [loss * (1.021 if i == 40 else 1) for i, loss in enumerate(CURVE)]
    assert not judged(off, "strict")
    assert judged(off, "published")
    assert judged([loss * (1.019 if i == 40 else 1) for i, loss in enumerate(CURVE)], "strict")


def test_two_per_cent_everywhere_fails_published():
    assert not judged([loss * 1.0201 for loss in CURVE], "published")
    assert judged([loss * 1.0199 for loss in CURVE], "published")
    signs = [
        loss * (1.03 if i % 2 else 0.97) for i, loss in enumerate(CURVE)
    ]  # errors that cancel in the average do not count as none
    assert metrics.compute_metrics(pair(CURVE, signs)).of_averages < 0.001
    assert not judged(signs, "published")


def test_a_curve_that_is_one_step_late_fails():
    assert not judged(CURVE[:1] + CURVE[:-1], "strict")
    assert not judged(CURVE[:1] + CURVE[:-1], "published")


def test_one_bit_fails_bitwise_only():
    bit = [float(np.nextafter(loss, 9)) if i == 7 else loss for i, loss in enumerate(CURVE)]
    assert not judged(bit, "bitwise")
    assert judged(bit, "strict")
    ref, cand = curve(CURVE, grad_norm=1.0), curve(CURVE, grad_norm=1.000001)
    assert not metrics.judge(metrics.compute_metrics(align(ref, cand)), "bitwise").passed


@pytest.mark.parametrize("other", [None, float("inf"), 1.5])
def test_a_gradient_norm_that_is_not_the_same_fails_bitwise(other):
    ref, cand = curve(CURVE, grad_norm=1.0), curve(CURVE, grad_norm=1.0)
    assert metrics.judge(metrics.compute_metrics(align(ref, cand)), "bitwise").passed
    cand = replace(cand, steps=(*cand.steps[:-1], replace(cand.steps[-1], grad_norm=other)))
    for pair_of in (align(ref, cand), align(cand, ref)):
        verdict = metrics.judge(metrics.compute_metrics(pair_of), "bitwise")
        assert not verdict.passed
        assert verdict.reason == "100 of 100 losses are the same number; 99 of 100 gradient norms are"
    both = metrics.judge(metrics.compute_metrics(align(cand, cand)), "bitwise")
    assert both.passed
    without = curve(CURVE)
    assert not metrics.judge(metrics.compute_metrics(align(ref, without)), "bitwise").passed
    assert metrics.judge(metrics.compute_metrics(align(without, without)), "bitwise").reason.endswith(
        "the logs have no gradient norms"
    )


# --- what does not belong together is refused


def refused(ref: LossCurve, cand: LossCurve, **part) -> str:
    with pytest.raises(UserError) as error:
        align(ref, cand, **part)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_lengths_and_steps():
    a, b = curve(CURVE, "REF"), curve(CURVE[:50], "CAND")
    message = refused(a, b)
    assert (
        "REF has 100 steps up to 800 consumed samples, CAND 50 up to 400: 408 is in REF but not in CAND"
        in message
    )
    assert "--last 400 compares what both have" in message
    assert len(align(a, b, last=400).positions) == 50
    gap = replace(a, steps=a.steps[:10] + a.steps[11:])
    assert "88 is in REF but not in CAND" in refused(a, replace(gap, path="CAND"))
    assert "--last" not in refused(a, replace(gap, path="CAND")).partition("CAND")[2]
    other = replace(b, steps=tuple(replace(step, samples=step.samples * 2) for step in b.steps))
    assert "8 is in REF" in refused(a, other)


def test_other_batch_sizes():
    slow = LossCurve("CAND", "", tuple(LoggedStep(i, 4 * i, loss=1.0) for i in range(2, 101, 2)))
    fast = LossCurve("REF", "", tuple(LoggedStep(i, 8 * i, loss=1.0) for i in range(1, 51)))
    assert "at 8 consumed samples REF has made 1 iterations and CAND 2" in refused(fast, slow)
    small, large = (
        LossCurve(name, "", tuple(LoggedStep(i, loss=1.0, global_batch_size=size) for i in (1, 2)))
        for name, size in (("S", 64), ("L", 128))
    )
    assert (
        "at 1 iterations S has a global batch size of 64 and L 128: runs of different batch sizes"
        in refused(small, large)
    )
    assert align(
        small, replace(large, steps=tuple(replace(step, global_batch_size=None) for step in large.steps))
    )


def test_means_of_other_iterations():
    """Logged every ten iterations, and resumed from the fifteenth: the line of the twentieth is a mean of
    five.
    """
    ref, cand = (
        LossCurve(
            name,
            "",
            tuple(
                LoggedStep(i, 8 * i, loss=1.0, interval=n) for i, n in zip((10, 20, 30), means, strict=True)
            ),
        )
        for name, means in (("REF", (10, 10, 10)), ("CAND", (10, 5, 10)))
    )
    assert "at 160 consumed samples REF gives the mean loss of 10 iterations and CAND 5: " in refused(
        ref, cand
    )
    assert len(align(ref, cand, last=80).positions) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": float("nan")}, "at 40 consumed samples the loss is nan"),
        ({"loss": float("inf")}, "at 40 consumed samples the loss is inf"),
        ({"loss": None}, "at 40 consumed samples there is no loss"),
        ({"grad_norm": float("nan")}, "at 40 consumed samples the gradient norm is nan"),
        ({"nans": 1}, "at 40 consumed samples 1 iterations were NaN"),
    ],
)
def test_nan(change, message):
    a, b = curve(CURVE, "REF"), curve(CURVE, "CAND")
    steps = list(b.steps)
    steps[4] = replace(steps[4], **change)
    bad = replace(b, steps=tuple(steps))
    assert message in refused(a, bad)
    assert refused(a, bad).startswith("CAND: ")
    assert refused(bad, a).startswith("CAND: ")
    assert align(a, bad, first=48)


def test_the_axis_is_the_first_that_both_say():
    def logged(*axes: str) -> LossCurve:
        steps = (LoggedStep(i, 8 * i, 128 * i, 1.0) for i in (1, 2))
        return LossCurve(
            "-".join(axes),
            "",
            tuple(
                replace(step, **{a: None for a in ("iteration", "samples", "tokens") if a not in axes})
                for step in steps
            ),
        )

    assert align(logged("samples", "iteration", "tokens"), logged("samples", "tokens")).axis == "samples"
    assert align(logged("samples", "tokens"), logged("tokens", "iteration")).axis == "tokens"
    assert align(logged("samples", "iteration"), logged("tokens", "iteration")).axis == "iteration"
    assert "cannot be aligned" in refused(logged("samples"), logged("iteration"))


def test_samples_that_do_not_grow_are_no_place():
    stuck = LossCurve("a", "", tuple(LoggedStep(i, 8, loss=1.0) for i in (1, 2)))
    assert align(stuck, stuck).axis == "iteration"


def test_a_part_that_is_not_there():
    assert "no step from 900 to the end: this log goes from 8 to 800" in refused(
        curve(CURVE), curve(CURVE), first=900
    )


def test_bitwise_wants_all_digits(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(" iteration 1/ 2 | consumed samples: 8 | lm loss: 2.382640E+00 |\n")
    with pytest.raises(UserError, match="needs 9 digits of every loss, this log shows 7"):
        comparing.compare(tmp_path / "a", tmp_path / "b", profile="bitwise")
    assert comparing.compare(tmp_path / "a", tmp_path / "b", profile="strict").verdict.passed
    old = ours(1, 2.5).replace(
        "1.00000000E+00", "1.000000"
    )  # six decimals of a norm, as our older logs have them
    (tmp_path / "a").write_text(old)
    with pytest.raises(UserError, match="needs 9 digits of every gradient norm, this log shows 7"):
        comparing.compare(tmp_path / "a", tmp_path / "a", profile="bitwise")
    (tmp_path / "a").write_text(ours(1, 2.5))
    assert comparing.compare(tmp_path / "a", tmp_path / "a", profile="bitwise").verdict.passed


@pytest.mark.parametrize(("loss", "passes"), [(4.4512, False), (4.451234817504883, True)])
def test_bitwise_wants_all_digits_of_json_too(tmp_path, loss, passes):
    (tmp_path / "a").write_text(f'{{"step": 1, "loss": {loss}}}\n{{"step": 2, "loss": 2.5}}\n')
    if passes:
        assert comparing.compare(tmp_path / "a", tmp_path / "a", profile="bitwise").verdict.passed
    else:
        with pytest.raises(UserError, match="needs 9 digits of every loss, this log shows 5"):
            comparing.compare(tmp_path / "a", tmp_path / "a", profile="bitwise")


def test_a_second_run_of_another_origin_is_refused(tmp_path):
    ref, cand = (write_run(tmp_path / name, CURVE, seed="1") for name in ("ref", "cand"))
    same, other = (
        write_run(tmp_path / "same", CURVE, seed="1"),
        write_run(tmp_path / "other", CURVE, seed="2"),
    )
    assert comparing.compare(ref, cand, same).noise
    with pytest.raises(UserError, match="the runs began with another seed"):
        comparing.compare(ref, cand, other)


def test_a_second_run_on_another_axis_is_refused(tmp_path):
    ref = write_run(tmp_path / "ref", CURVE)
    (tmp_path / "neox.log").write_text(
        "".join(f" iteration {i}/ 100 | lm_loss: {x:.6E} |\n" for i, x in enumerate(CURVE, 1))
    )
    with pytest.raises(UserError, match=r"neox\.log is aligned by iteration, the other two logs by samples"):
        comparing.compare(ref, ref, tmp_path / "neox.log")


# --- the tool and what it leaves


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs compare_loss.py; returns exit code, stdout and stderr."""

    def go(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare_loss.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(launch.ROOT / "tools/compare_loss.py"), run_name="__main__")
        output = capsys.readouterr()
        return end.value.code or 0, output.out, output.err

    return go


class Links(html.parser.HTMLParser):
    """Collects the addresses that a page makes its browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_pass_and_what_is_left(tool, tmp_path):
    ref, cand = (
        write_run(tmp_path / "ref", CURVE),
        write_run(tmp_path / "cand", [x * 1.001 for x in CURVE], zero_stage=1),
    )
    ref2 = write_run(tmp_path / "ref2", [x * 0.999 for x in CURVE])
    out = tmp_path / "out"
    code, output, _ = tool(ref, cand, "--out", out, "--ref2", ref2, "--profile", "strict")
    assert code == 0
    assert output.splitlines()[-2].startswith(
        "PASS (strict): 100.00% of 100 steps below 2%; the worst is 0.10%, at "
    )
    assert "  zero_stage: 2 | 1\n" in output
    assert sorted(p.name for p in out.iterdir()) == ["parity.html", "parity.json", "parity.png"]

    table = json.loads((out / "parity.json").read_text(), parse_constant=pytest.fail)
    assert (table["verdict"], table["profile"], table["aligned by"]) == ("pass", "strict", "consumed samples")
    assert (table["first"], table["last"], table["figures"]["steps"]) == (8, 800, 100)
    assert table["figures"]["mean"] == pytest.approx(0.001, rel=1e-6)
    assert table["noise"]["bias"] == pytest.approx(-0.001, rel=1e-6)
    assert table["settings that differ"] == {"zero_stage": ["2", "1"]}
    assert table["reference"]["sha256"] == hashlib.sha256((ref / "train.log").read_bytes()).hexdigest()

    page, image = (out / "parity.html").read_text(), (out / "parity.png").read_bytes()
    links = Links()
    links.feed(page)
    assert links.found == [
        "data:image/png;base64," + base64.b64encode(image).decode()
    ]  # all it needs is inside
    assert not links.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"url\(|@import|https?:", page)
    assert '<tr class="differs"><td>zero_stage</td><td>2</td><td>1</td></tr>' in page
    assert page.count('class="differs"') == 1
    assert "&lt;b&gt;corpus" in page  # what a log says is text, never markup
    assert "<b>" not in page
    assert "Median of e." in page
    assert "e = |candidate - reference| / max(|reference|, 1e-6)" in page
    assert image.startswith(b"\x89PNG")


def test_fail(tool, tmp_path):
    ref, cand = write_run(tmp_path / "ref", CURVE), write_run(tmp_path / "cand", CURVE[1:] + CURVE[:1])
    code, output, _ = tool(ref, cand, "--out", tmp_path / "out")
    assert code == 1
    assert "FAIL (published): mean relative error" in output
    assert json.loads((tmp_path / "out/parity.json").read_text())["verdict"] == "fail"


def test_what_cannot_be_compared_is_one_line_and_leaves_no_verdict(tool, tmp_path):
    ref, cand = (
        write_run(tmp_path / "ref", CURVE),
        write_run(tmp_path / "cand", [*CURVE[:50], float("nan"), *CURVE[51:]]),
    )
    for words, message in (
        ((ref, cand), "at 408 consumed samples the loss is nan"),
        ((ref, write_run(tmp_path / "short", CURVE[:9])), "80 is in"),
        ((ref, tmp_path / "nothing"), "there is no such log"),
        ((ref,), "CAND"),
        ((ref, ref, "--profil", "strict"), "did you mean --profile"),
        ((ref, ref, "--same-origin"), "origin.json is missing"),
    ):
        code, out, err = tool(*words, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert message in err
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_is_refused_leaves_no_older_verdict(tool, tmp_path):
    ref, out = write_run(tmp_path / "ref", CURVE), tmp_path / "out"
    assert tool(ref, ref, "--out", out)[0] == 0
    assert tool(ref, tmp_path / "nothing", "--out", out)[0] == 2
    assert list(out.iterdir()) == []


def test_logs_of_two_kinds(tool, tmp_path):
    """A run compared with its log from another program: seven digits, iterations only."""
    ref = write_run(tmp_path / "ref", CURVE)
    lines = (f" samples/sec: 7.8 | iteration {i}/ 100 | lm_loss: {x:.6E} |\n" for i, x in enumerate(CURVE, 1))
    (tmp_path / "neox.log").write_text("".join(lines))
    code, output, _ = tool(ref, tmp_path / "neox.log", "--out", tmp_path / "out", "--profile", "strict")
    assert code == 0
    assert "aligned by iterations, 1 to 100" in output
    assert "settings that differ" not in output  # one of the logs has none
    assert "so they cannot be compared" in (tmp_path / "out/parity.html").read_text()


def test_a_single_step_can_be_drawn(tmp_path):
    ref = write_run(tmp_path / "ref", CURVE[:1])
    assert len(report.write_report(comparing.compare(ref, ref), tmp_path / "out")) == 3


def test_a_verdict_never_stands_beside_an_older_picture(tmp_path, monkeypatch):
    comparison = comparing.compare(write_run(tmp_path / "ref", CURVE), tmp_path / "ref")
    report.write_report(comparison, tmp_path / "out")
    monkeypatch.setattr(report, "as_html", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(comparison, tmp_path / "out")
    assert not (tmp_path / "out/parity.json").exists()


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    atomic.write_file(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        atomic.write_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def test_an_out_that_cannot_be(tmp_path):
    comparison = comparing.compare(write_run(tmp_path / "ref", CURVE[:2]), tmp_path / "ref")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"parity\.json cannot be deleted: Not a directory"):
        report.write_report(comparison, tmp_path / "file")
