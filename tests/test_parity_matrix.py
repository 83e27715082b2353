"""The parity matrix: some rows by the real command, its judgement by hand, and the whole matrix as a slow
test.
"""

import ast
import copy
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import launch, oracle
from helpers.imports import imported

from ascendspeed.cli import validation
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

sys.path.append(str(launch.ROOT))  # as `python -m benchmarks.parity_matrix` has it

from benchmarks.parity_matrix import __main__ as command_line
from benchmarks.parity_matrix import differences, layouts, reference, report, runner
from benchmarks.parity_matrix.differences import Differences, compare
from benchmarks.parity_matrix.reference import TrainedModel
from benchmarks.parity_matrix.runner import MatrixResults, RowResult

LAYOUT, CONTROL = layouts.NAMED["Megatron DP2"], layouts.CONTROLS[0]


def command(*words: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """The real one."""
    result_line = [sys.executable, "-m", "benchmarks.parity_matrix", *words]
    return subprocess.run(
        result_line,
        cwd=launch.ROOT,
        env=launch.environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.slow
def test_a_few_rows_and_a_control(cpu, tmp_path, monkeypatch, capsys):
    """A row of either engine and a control on two ranks: exit code, progress, page and record."""
    words = ["--families", "internlm2", "--steps", "4", "--out", str(tmp_path / "matrix.md"), "--rows"]
    few = ["DeepSpeed ZeRO-3, recompute", "Megatron TP2+SP; c"]
    monkeypatch.setattr(sys, "argv", ["parity_matrix", *words, *few])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert command_line.main() == 0
    output = capsys.readouterr().out
    assert "[2/2] internlm2, 2 processes: " in output
    page, record = (tmp_path / "matrix.md").read_text(), json.loads((tmp_path / "matrix.json").read_text())
    assert page in output
    assert "**1 of 1 rows within bounds, 1 of 1 controls out of them.**" in page
    assert [row["control"] for row in record["rows"]] == [None, "sequence-parallel sum missing"]
    for row in record["rows"]:
        figures = row["figures"]
        if row["control"]:
            assert {"loss_relative", "weight"} <= set(row["broken"])
        else:
            assert (
                figures["loss_relative"] < 1e-5,
                figures["norm_relative"] < 1e-5,
                0 < figures["weight"] < 1e-4,
            ) == (True,) * 3, row
    assert {"date", "hardware", "versions", "commit", "bounds", "references"} <= record.keys()


@pytest.mark.slow
def test_the_whole_matrix(tmp_path):
    done = command("--out", str(tmp_path / "matrix.md"), timeout=7200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


# ---------------------------------------------------------------- the reference


SHARED = "ascendspeed.(config|models.param_mapping|models.families)(\\..*)?"
"""Modules of the library that the reference may use: settings and names, but neither the model nor the
engines.
"""


def library_imports(path: str | Path) -> set[str]:
    names = imported(ast.parse(Path(path).read_text()))
    return {name for name in names if name.startswith("ascendspeed.")}


def test_the_reference_owes_nothing_to_our_model_or_engines():
    for path in (reference.__file__, oracle.__file__):
        assert all(re.fullmatch(SHARED, name) for name in library_imports(path)), path
    worker = library_imports(launch.ROOT / "tests/helpers/engine_worker.py")  # control
    assert any(name.startswith("ascendspeed.training.engines.") for name in worker)
    assert any(name.startswith("ascendspeed.models.gpt.") for name in worker)
    assert not all(re.fullmatch(SHARED, name) for name in worker)


@pytest.mark.breadth
@pytest.mark.parametrize("family", layouts.MODELS)
def test_the_weights_of_the_end_have_the_names_of_the_start(family, tmp_path):
    """Every tensor has gone some way; wrong weights differ from the right ones in what they say."""
    reference_model = reference.build_reference(family, 2, set(mistakes_of(family)), tmp_path)
    assert reference_model.end.weights.keys() == reference_model.start.keys()
    assert all(
        not torch.equal(reference_model.end.weights[name], tensor)
        for name, tensor in reference_model.start.items()
    )
    assert len({Path(path).read_bytes() for path in reference_model.files.values()}) == 1 + len(
        mistakes_of(family)
    )
    assert all(
        compare(other, reference_model.end, reference_model.start).loss > 0
        for other in reference_model.others.values()
    )


def mistakes_of(family: str) -> list[str]:
    return [
        row.weights
        for row in layouts.CONTROLS
        if family in row.families and row.weights and row.precision == "fp32"
    ]


def test_masters_and_copies_of_the_same_type_train_like_one_model():
    """Sample by sample over masters is the plain loop; in bf16 it is not, and the rotary embedding keeps its
    frequencies.
    """
    model = layouts.MODELS["internlm2"]
    data = oracle.batches(model.vocab_size, 3, 4, 32, 7)
    optim = vars(layouts.base_run(model, 3).optim)

    def curve(make, samples=None):
        masters, _ = oracle.native(model)
        return oracle.train(masters, data, [1e-2] * 3, optim, make(masters), samples)

    plain = curve(lambda masters: None)
    assert torch.allclose(torch.tensor(curve(copy.deepcopy, 1)), torch.tensor(plain), rtol=1e-5)
    rounded = torch.tensor(curve(oracle.halved, 1))
    assert 1e-4 < (rounded - torch.tensor(plain)).abs().max() < 0.1
    half = oracle.halved(oracle.native(model)[0])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} == {torch.float32}


# ---------------------------------------------------------------- the judgement

START = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
END = {"a": torch.tensor([[3.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([0.0, 0.0, 4.0])}
EXPECTED = TrainedModel([(2.0, 10.0), (1.0, 5.0)], END)
BOUNDS = differences.Bounds({"loss_relative": 1e-5, "norm_relative": 1e-5, "weight": 1e-3})


def judged(curve=EXPECTED.curve, weights=END) -> tuple[Differences, list[str]]:
    differing = compare(TrainedModel(curve, weights), EXPECTED, START)
    return differing, BOUNDS.broken(differing)


def test_figures_by_hand():
    differing, broken = judged([[2.5, 10.0], [1.0, 4.0]], END | {"b": torch.tensor([0.5, 0.0, 4.0])})
    assert vars(differing) == pytest.approx(
        {
            "loss": 0.5,
            "loss_relative": 0.25,
            "norm": 1.0,
            "norm_relative": 0.2,
            "weight": 0.5,
            "weight_relative": 0.5 / 26**0.5,
        }
    )
    assert broken == ["loss_relative", "norm_relative", "weight"]
    assert judged() == (Differences(0, 0, 0, 0, 0, 0), [])


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"curve": [(2.0, 10.0), (1.0001, 5.0)]}, ["loss_relative"]),
        ({"curve": [(2.0, 10.0), (1.0, 5.001)]}, ["norm_relative"]),
        ({"curve": [(2.0, 10.0)]}, ["loss_relative", "norm_relative"]),
        ({"curve": [(2.0, 10.0), (None, None)]}, ["loss_relative", "norm_relative"]),
        ({"curve": [(2.0, 10.0), (math.nan, 5.0)]}, ["loss_relative"]),
        ({"weights": END | {"a": END["a"].t()}}, ["weight"]),
        ({"weights": END | {"b": END["b"].flip(0)}}, ["weight"]),
        ({"weights": END | {"b": END["b"] * math.nan}}, ["weight"]),
        ({"weights": {"a": END["a"]}}, ["weight"]),
        ({"weights": END | {"c": END["b"]}}, ["weight"]),
        ({"weights": END | {"a": END["a"].flatten()}}, ["weight"]),
    ],
)
def test_every_column_sees_what_it_should(changes, seen):
    assert judged(**changes)[1] == seen


def test_the_band_of_bf16():
    """Between a tenth of the nearer reference's distance and twice the farther one's, column by column."""
    near, far = Differences(1, 1e-3, 1, 4e-2, 1, 5e-2), Differences(1, 2e-3, 1, 3e-2, 1, 4e-2)
    bounds = differences.bf16_bounds(near, far)
    assert bounds.most == pytest.approx(
        {"loss_relative": 4e-3, "norm_relative": 8e-2, "weight_relative": 0.1}
    )
    assert bounds.least == pytest.approx(1e-4)
    assert bounds.broken(near) == bounds.broken(far) == []
    assert bounds.broken(replace(near, loss_relative=5e-3)) == ["loss_relative"]
    assert bounds.broken(replace(near, loss_relative=1e-7)) == ["loss_relative"]  # it was not bf16
    assert bounds.broken(replace(near, weight_relative=0.2, weight=1e9)) == ["weight_relative"]


def test_a_result_is_good_when_it_is_as_it_should_be():
    differing = Differences(0, 0, 0, 0, 0, 0)
    assert RowResult("internlm", LAYOUT, differing, []).good
    assert not RowResult("internlm", LAYOUT, differing, ["weight"]).good
    assert RowResult("internlm", CONTROL, differing, ["weight"]).good
    assert not RowResult("internlm", CONTROL, differing, []).good
    assert not RowResult("internlm", LAYOUT, None, []).good
    assert not RowResult("internlm", CONTROL, None, []).good


def test_a_start_that_fails_is_said_and_counts(monkeypatch, tmp_path):
    def ranks(*words):
        raise AssertionError("exit codes [1, 0]")

    monkeypatch.setattr(launch, "ranks", ranks)
    reference_model = reference.Reference(
        layouts.MODELS["internlm"], START, EXPECTED, {}, {None: "right", "heads": "wrong"}
    )
    messages: list[str] = []
    measured = list(
        runner.run_ranks(
            "internlm",
            2,
            [LAYOUT, CONTROL],
            reference_model,
            4,
            tmp_path,
            runner.ProgressLog(2, messages.append),
        )
    )
    assert measured == [(LAYOUT, None), (CONTROL, None)]
    assert "exit codes [1, 0]" in messages[0]


def test_every_row_is_told_once_as_it_begins(tmp_path):
    told: list[str] = []
    with runner.report_cases(tmp_path / "log", {"one", "two", "three"}, told.append):
        (tmp_path / "log").write_text("a warning\none\nsomething else\ntwo\n")
    assert told == ["one", "two"]


def test_the_page_and_the_record():
    results = [
        RowResult("internlm", LAYOUT, Differences(1e-7, 2e-8, 1, math.nan, 1, 1), ["norm_relative"]),
        RowResult("internlm", layouts.NAMED["Megatron TP2"], None, []),
        RowResult("internlm", CONTROL, Differences(0, 0, 0, 0, 0, 0), []),
    ]
    facts = {"date": "today", "hardware": "here", "python": "3", "versions": {"torch": "2"}, "commit": "abc"}
    apart = {("internlm", reference.FP32): Differences(0, 0, 0, 0, 0, 0)}
    measured = MatrixResults(results, {("internlm", "fp32"): BOUNDS}, apart, 20, 60.0)
    assert not measured.good
    page = report.as_markdown(measured, facts)
    assert "**0 of 2 rows within bounds, 0 of 1 controls out of them.**" in page
    assert (
        "| Megatron DP2 | 2 | 1.0e-07 | 2.0e-08 | 1.0e+00 | **nan** | 1.0e+00 | 1.0e+00 | **out of bounds** |"
        in page
    )
    assert "| Megatron TP2 | 2 |  |  |  |  |  |  | **did not end** |" in page
    assert (
        "| Megatron DP2: mean of means | 2 | 0.0e+00 | 0.0e+00 | 0.0e+00 | 0.0e+00 | 0.0e+00 | 0.0e+00 | "
        "**not seen** |" in page
    )
    record = json.loads(report.as_json(measured, facts))
    assert [row["good"] for row in record["rows"]] == [False] * 3
    assert record["rows"][0]["figures"]["norm_relative"] is None
    assert record["rows"][1]["figures"] is None


# ---------------------------------------------------------------- the rows


def test_every_row_is_a_run_that_the_recipe_would_take():
    starts = layouts.select_rows(list(layouts.MODELS), [])
    for (family, world), rows in starts.items():
        titles = [row.title for row in rows]
        assert len(titles) == len(set(titles))
        assert not any("hpz" in title for title in titles[:-1])  # a process can have it once, as its last
        for row in rows:
            assert (row.world, family in FAMILIES) == (world, True)
            validation.check_run(row.run(layouts.MODELS[family], 20), world)


def test_every_control_has_one_mistake():
    for row in layouts.CONTROLS:
        right = next(
            layout for layout in layouts.NAMED.values() if row.title.startswith(layout.title + "; control")
        )
        differs = [
            name
            for name in ("optim", "mistake", "weights", "as_bf16")
            if getattr(row, name) != getattr(right, name)
        ]
        assert len(differs) == 1, row.title
        assert (row.parallel, row.train) == (right.parallel, right.train)


def test_rows_are_chosen_by_their_titles():
    select_rows = layouts.select_rows(["internlm2", "mixtral"], ["ep2X", "cp4"])
    assert {start: [row.name for row in some] for start, some in select_rows.items()} == {
        ("internlm2", 4): ["CP4"],
        ("mixtral", 4): ["EP2xDP2, ZeRO-1 in 2 copies (hybrid)", "EP2xPP2", "EP2xTP2+SP"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps 1: at least 2"),
        (["--out", "x.json"], "--out x.json: the name of a Markdown file"),
        (["--families", "gpt"], "gpt"),
        (["--rows", "TP3", "--families", "internlm"], "--rows TP3: no row of internlm has such a title"),
    ],
)
def test_what_cannot_be_run_is_one_line(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parity_matrix", *words])
    with pytest.raises(UserError, match=message) as error:
        command_line.main()
    assert "\n" not in str(error.value)
    assert error.value.code == errors.EXIT_USER_ERROR
