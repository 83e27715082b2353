"""First run on a GPU or NPU: every part on a CPU with toy sizes, the report, and parts that fail."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import launch

sys.path.append(str(launch.ROOT / "benchmarks"))

import first_run_parts as parts
import first_run_serving as serving
import gpu_first_run as first_run

from ascendspeed.models import int8


@pytest.fixture
def here(cpu, tmp_path, monkeypatch):
    """The parts on a CPU, with their children in this process."""
    monkeypatch.setattr(
        parts, "_child", lambda what, kind, name, **_: json.dumps(parts.CHILDREN[what](cpu, name))
    )
    tiny = replace(parts.TOY, num_layers=1, hidden_size=64, ffn_hidden_size=96, vocab_size=128)
    monkeypatch.setattr(parts, "TOY", tiny)
    return parts.Part(cpu, tmp_path)


@pytest.mark.parametrize(
    "name",  # the engines of "engine" have tests of their own
    [pytest.param(name, marks=pytest.mark.slow if name == "engine" else []) for name in first_run.LIMITS],
)
def test_every_part_fills_its_tables(here, name):
    parts.PARTS[name](here)
    assert here.tables
    for table in here.tables:
        assert table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    if name == "engine":
        assert [row[0] for row in here.tables[0]["rows"]] == list(parts.CASES)
    if name == "trace":
        assert json.loads((here.folder / "trace.json").read_text())["traceEvents"]


def test_a_wrong_loss_ends_the_part(here, monkeypatch):
    curves = {"cpu": [[1.0, 2.0, 3.0]] * 3}
    monkeypatch.setattr(here, "here", replace(here.here, kind="other"))
    monkeypatch.setattr(
        parts, "_child", lambda what, kind, name: json.dumps(curves.get(kind, [[1.0, 2.0, 3.001]] * 3))
    )
    monkeypatch.setattr(parts, "_check_kernels", lambda part, check: None)
    monkeypatch.setattr(parts, "_adamw_spread", lambda part: 0.0)
    with pytest.raises(SystemExit, match="wrong: losses of Megatron"):
        parts.right(here)


@pytest.mark.parametrize("name", ["attention", "graphs", "product"])
def test_a_wrong_kernel_of_serving_ends_the_part(here, monkeypatch, name):
    monkeypatch.setattr(serving, "RUNNING", (3,))
    monkeypatch.setattr(serving, "ROWS", (8,))
    gathered, ways, linear = serving.gathered, serving._ways, int8.linear
    if name == "attention":
        monkeypatch.setattr(serving, "gathered", lambda *inputs: gathered(*inputs).roll(1, 0))
        problem = "stand-in with 3 requests"
    elif name == "graphs":
        monkeypatch.setattr(
            serving, "_ways", lambda *_: [replace(way, capture=way.capture and fails) for way in ways(*_)]
        )
        problem = "stand-in for graphs with 3 requests"
    else:
        monkeypatch.setattr(int8, "linear", lambda *inputs: linear(*inputs) * 1.02)
        problem = "qkv in int8 with 8 rows; proj in int8 with 8 rows"
    with pytest.raises(SystemExit, match=f"wrong: {problem}"):
        parts.serving(here)
    assert len(here.tables) == 2


def fails(function):
    raise RuntimeError("no capture")


def test_the_parts_take_nine_minutes_at_most():
    assert sum(first_run.LIMITS.values()) <= 9 * 60
    assert next(iter(first_run.LIMITS)) == "right"
    assert set(first_run.LIMITS) == set(parts.PARTS)


def test_the_report_has_tables_and_failures(tmp_path, monkeypatch):
    """Parts in a shell: one writes a table, one fails, one takes too long."""
    table = [{"title": "T", "columns": ["a", "b"], "rows": [[1, 2.5]]}]
    programs = {
        "gemm": f"import sys; open(sys.argv[3] + '/gemm.json', 'w').write({json.dumps(table)!r})",
        "engine": "raise SystemExit('failed: all of them')",
        "trace": "import time; time.sleep(60)",
    }
    real = subprocess.run

    def run(words, **settings):
        words = [sys.executable, "-c", programs[words[5]], *words[5:]]
        return real(words, **settings | {"timeout": 30 if words[3] != "trace" else 0.01})

    monkeypatch.setattr(first_run.subprocess, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["x", "--dry", "--out", str(tmp_path / "out"), "--only", "gemm", "engine", "trace"]
    )
    assert first_run.main() == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| a | b |\n|---|---|\n| 1 | 2.5 |" in report
    assert "**FAILED**: exit code 1: failed: all of them" in report
    assert "**FAILED**: over its" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["python", "benchmarks/gpu_first_run.py", "--out"], ["bash", "benchmarks/npu_first_run.sh"]]
)
def test_a_dry_run_of_the_real_command(words, tmp_path):
    done = subprocess.run(
        [*words, str(tmp_path), "--dry"], cwd=launch.ROOT, env=launch.environment(), text=True
    )
    assert done.returncode == 0
    assert "FAILED" not in (tmp_path / "report.md").read_text()


def test_the_npu_script_says_what_is_missing(tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        command = ["bash", str(launch.ROOT / "benchmarks/npu_first_run.sh"), *words]
        environment = {k: v for k, v in launch.environment().items() if k != "ASCEND_HOME_PATH"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run().returncode == 2
    missing = run(str(tmp_path))
    assert (missing.returncode, missing.stderr) == (
        2,
        "error: ASCEND_HOME_PATH is not set: source CANN's set_env.sh first\n",
    )
