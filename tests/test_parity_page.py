"""Page and terminal report of a comparison: provenance, speed, folded settings, meaning of the figures."""

import json
from dataclasses import asdict, replace

import pytest
from helpers.loss_curves import CURVE, example_run, write_run
from helpers.training_logs import ours

from ascendspeed.loss_compare import compare as comparing
from ascendspeed.loss_compare import metrics, report


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    ref, cand = write_run(folder / "ref", CURVE), write_run(folder / "cand", CURVE, zero_stage=3)
    for run, ms in ((ref, 500.0), (cand, 250.0)):
        head = (run / "train.log").read_text().splitlines(keepends=True)[:2]
        steps = [
            ours(i, loss, ms_per_iteration=ms, tokens_per_s=64e3 / ms) for i, loss in enumerate(CURVE, 1)
        ]
        (run / "train.log").write_text("".join(head + steps))
    return comparing.compare(ref, cand)


def test_page_names_speed_and_provenance(comparison, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/compare_loss.py", "REF", "my run"])
    page = report.as_html(comparison, b"")
    assert "0.500 s per step, 128 tokens/s per device" in page
    assert "0.250 s per step, 256 tokens/s per device" in page
    assert "compare_loss.py REF &#39;my run&#39;" in page
    assert "UTC, on " in page
    assert "<p>Distance of a candidate from its reference.</p>\n<p>Per step, e = " in page
    record = json.loads(json.dumps(report.as_json(comparison)))
    assert record["made"]["command"] == "compare_loss.py REF 'my run'"


def test_equal_settings_are_folded_and_the_page_fits_a_telephone(comparison):
    page = report.as_html(comparison, b"")
    shown, folded = page.split("<details>")
    assert '<tr class="differs"><td>zero_stage</td><td>2</td><td>3</td></tr>' in shown
    assert "<td>hidden_size</td>" in folded
    assert "<td>hidden_size</td>" not in shown
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in shown
    assert page.count("<table>") == page.count('<div class="wide"><table>')


def test_terminal_report_explains_every_figure(comparison):
    lines = report.as_text(comparison)
    assert "Per step, e = |candidate - reference| / max(|reference|, 1e-6)." in lines
    figures = [line for line in lines if line[:2] == "  " and line[2:3].strip()]
    for name in metrics.metric_definitions():
        (line,) = [line for line in figures if line[2:].startswith(f"{name.replace('_', ' '):19} ")]
        assert len(line) <= 100
        assert line[34:].strip(), line
    note = "note: reference and candidate are the same file"  # and so pass whatever they hold
    assert note not in lines
    assert note in report.as_text(replace(comparison, cand=comparison.ref))


def test_settings_that_differ_name_other_inputs(tmp_path):
    def run(name, **inputs):
        log = write_run(tmp_path / name, CURVE) / "train.log"
        config = asdict(example_run()) | {"inputs": inputs} if inputs else asdict(example_run())
        if not inputs:
            del config["inputs"]  # as an earlier version logs it
        steps = [ours(i, loss) for i, loss in enumerate(CURVE, 1)]
        log.write_text("".join([f"run: {json.dumps(config)}\n", *steps]))
        return log

    first = run("first", data=["a1"], tokenizer="t", deepspeed_config='{"x": 1}')
    second = run("second", data=["b2"], tokenizer="t", deepspeed_config='{"x": 2}')
    assert comparing.compare(first, second).differences == (
        ("inputs.data", "a1", "b2"),
        ("inputs.deepspeed_config", '{"x": 1}', '{"x": 2}'),  # the setting of this name is the path
    )
    assert comparing.compare(first, run("third")).differences == ()
