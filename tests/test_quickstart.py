"""The quickstart's shell code with stand-ins, interrupted and resumed; setup of the environment."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import corpus, launch

from ascendspeed.training import metric_lines

QUICKSTART = "examples/intern/quickstart.sh"
PYTHON = """#!/usr/bin/env bash
set -eu
cd "$WORK"
echo "$(basename "$1")" >> said
case "$1" in
    *make_quickstart_data.py) mkdir -p data; [ -f data/made.json ] || touch data/made.json
        echo '{"instruction": "What?", "output": "That."}' | tee data/chat.jsonl > data/chat_heldout.jsonl ;;
    *preprocess_data.py)
        if [[ "$*" == *chat.jsonl* ]]; then touch chat_packed_input_ids_document.idx; exit; fi
        touch alpaca_text_document.bin alpaca_text_document.idx ;;
    *random_model.py) mkdir hf ;;
    *convert_weights_from_huggingface.py) mkdir weights ;;
    *convert.py) mkdir export; cp ckpt/latest export/config.json ;;
    *quickstart_report.py) cat export/config.json >> said ;;
esac
"""
RECIPE = """#!/usr/bin/env bash
set -eu
exit_interval=$(grep -o -- '--exit-interval .*' <<< "$*" || true)
echo "train from $(basename "$CHECKPOINT") $exit_interval" >> "$WORK/said"
steps=("$SAVE"/step_*)
n=0
if [ "$CHECKPOINT" = "$SAVE" ]; then n=$((10#${steps[-1]##*_})); elif [ -d "${steps[-1]}" ]; then exit 2; fi
[[ "$*" =~ --exit-interval\\ ([0-9]+) ]] && leave=${BASH_REMATCH[1]} || leave=1000000
while [ "$n" -lt "$TRAIN_ITERS" ]; do
    n=$((n + 1))
    [ "$n" != "${KILL_AT:-}" ] || kill -9 $$
    if ((n % SAVE_INTERVAL == 0 || n % leave == 0 || n == TRAIN_ITERS)); then
        mkdir -p "$SAVE/step_$(printf %07d "$n")"
        echo "step $n" > "$SAVE/latest"
    fi
    ((n % leave)) || break
done
"""
FINETUNE = """#!/usr/bin/env bash
set -eu
mkdir -p "$SAVE"
echo "fine-tune from $(cat "$CHECKPOINT/latest")" >> "$WORK/said"
[ "${KILL_AT:-}" != chat ] || { touch "$SAVE/latest"; kill -9 $$; }
"""
USED = """#!/usr/bin/env bash
echo "$(basename "$0")" >> "$WORK/said"
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def quickstart(tmp_path):
    """Runs the script; returns its exit code and what it started, by name."""
    root, work = tmp_path / "root", tmp_path / "work"
    executable(root / "bin/python", PYTHON)
    executable(root / "examples/intern/pretrain_internlm_7b_zero.sh", RECIPE)
    executable(root / "examples/intern/finetune_internlm_7b_alpaca.sh", FINETUNE)
    for recipe in ("examples/intern/generate_internlm_7b_deepspeed.sh", "tasks/evaluation/eval_internlm.sh"):
        executable(root / recipe, USED)
    executable(root / "tools/setup.sh", "")
    shutil.copyfile(launch.ROOT / QUICKSTART, root / QUICKSTART)

    def go(**env: str) -> tuple[int, list[str]]:
        work.mkdir(exist_ok=True)
        (work / "said").unlink(missing_ok=True)
        env |= {"WORK": str(work), "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", root / QUICKSTART], env=launch.environment(**env), capture_output=True, text=True
        )
        said = work / "said"
        calls = [line.strip() for line in said.read_text().splitlines()] if said.exists() else []
        if not done.returncode:
            used = calls.index(COMPLETED)
            assert calls[used : used + 2] == [COMPLETED, SCORED]
            # One question before and after, another one after; the summary is last.
            assert calls[-5:-1] == [*[COMPLETED] * 3, LAST]
            go.tuned = calls[used + 2 : -5]
            del calls[used:-2]
        return done.returncode, calls

    go.work = work
    return go


COMPLETED, SCORED = "generate_internlm_7b_deepspeed.sh", "eval_internlm.sh"
FIRST, LAST = "make_quickstart_data.py", "quickstart_report.py"
MADE = ["preprocess_data.py", "random_model.py", "convert_weights_from_huggingface.py"]
TRAINED = ["train from weights --exit-interval 60", "train from ckpt", "convert.py"]


def test_once_and_again(quickstart):
    assert quickstart() == (0, [FIRST, *MADE, *TRAINED, LAST, "step 100"])
    assert quickstart.tuned == ["preprocess_data.py", "fine-tune from step 100"]
    assert quickstart() == (0, [FIRST, LAST, "step 100"])
    assert not quickstart.tuned


def test_killed_while_it_fine_tunes(quickstart):
    assert quickstart(KILL_AT="chat")[0]
    assert quickstart() == (0, [FIRST, LAST, "step 100"])
    assert quickstart.tuned == ["fine-tune from step 100"]


@pytest.mark.parametrize(
    ("killed_at", "then"),
    [
        ("40", ["train from weights --exit-interval 60", "train from ckpt"]),
        ("55", ["train from ckpt --exit-interval 60", "train from ckpt"]),
        ("75", ["train from ckpt"]),
    ],
)
def test_killed_while_it_trains(quickstart, killed_at, then):
    assert quickstart(KILL_AT=killed_at)[0]
    assert quickstart() == (0, [FIRST, *then, "convert.py", LAST, "step 100"])


def test_more_iterations_are_exported_again(quickstart):
    quickstart()
    assert quickstart(ITERS="150") == (0, [FIRST, "train from ckpt", "convert.py", LAST, "step 150"])
    assert quickstart.tuned == ["fine-tune from step 150"]
    assert quickstart(ITERS="150") == (0, [FIRST, LAST, "step 150"])


def test_fewer_iterations_than_the_stop(quickstart):
    assert quickstart(ITERS="20") == (
        0,
        [FIRST, *MADE, "train from weights --exit-interval 60", "convert.py", LAST, "step 20"],
    )
    assert quickstart(ITERS="20") == (0, [FIRST, LAST, "step 20"])


def test_new_data_make_everything_new(quickstart):
    quickstart(ITERS="150")
    (quickstart.work / "data/made.json").unlink()
    assert quickstart() == (0, [FIRST, *MADE, *TRAINED, LAST, "step 100"])
    assert quickstart.tuned == ["preprocess_data.py", "fine-tune from step 100"]
    assert quickstart() == (0, [FIRST, LAST, "step 100"])


def test_an_export_that_was_being_replaced_is_no_export(quickstart):
    quickstart()
    (quickstart.work / "export/config.json").unlink()
    assert quickstart() == (0, [FIRST, "convert.py", LAST, "step 100"])


def test_a_folder_with_other_files_is_left_alone(quickstart):
    """`WORK=.` would replace ./evaluation, the default output of an evaluation."""
    (quickstart.work / "evaluation").mkdir(parents=True)
    (quickstart.work / "evaluation/results.json").touch()
    assert quickstart() == (2, [])
    assert (quickstart.work / "evaluation/results.json").exists()
    shutil.rmtree(quickstart.work / "evaluation")
    assert quickstart()[0] == 0
    assert quickstart()[0] == 0


# --- the report


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location(
        "quickstart_report", launch.ROOT / "examples/intern/quickstart_report.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(iteration: int, loss: float) -> str:
    more = {"tokens_per_s": 10.0, "memory_gib": 1.0}
    line = metric_lines.TrainLine("2026-01-01 00:00:00", iteration, 4, loss=loss, **more)
    return metric_lines.format_line(line) + "\n"


def test_report_counts_an_iteration_once(report, tmp_path):
    (tmp_path / "train.log").write_text(
        "".join(line(i, loss) for i, loss in ((1, 4.0), (2, 3.0), (3, 9.0), (3, 2.5), (4, 2.0)))
    )
    train = report.log_lines(tmp_path / "train.log")
    assert [(line.iteration, line.loss) for line in train] == [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)]
    rows = report.of_training(tmp_path, train, [metric_lines.EvalLine(2, 9.0), metric_lines.EvalLine(4, 3.0)])
    assert ("training loss, first -> last", "4.0000 -> 2.0000 (4 iterations)") in rows
    assert ("validation loss: rows that --split set aside", "3.0000") in rows


def test_held_out_rows_have_the_form_of_training_rows(report, tmp_path):
    """Without the prompt their loss would not be comparable with that of training."""
    import pyarrow
    import pyarrow.parquet

    from ascendspeed.tokenization import tokenizer

    corpus.sentencepiece_dir(tmp_path / "data/tokenizer")
    rows = {"instruction": ["a", "b"], "input": ["", "x = 1"], "output": ["one", "two"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "data/heldout.parquet")
    head = "the request.\n\n### Instruction:\n"
    ends = [
        f"{head}a\n\n### Response: ASSISTANT: one",
        f"{head}b\n\n### Input:\nx = 1\n\n### Response: ASSISTANT: two",
    ]
    loaded = tokenizer.load(tmp_path / "data/tokenizer")
    samples = report.held_out(tmp_path, 8)
    ids = samples[:, :-1].flatten().tolist()
    cut = ids.index(loaded.eos)
    first, second = loaded.decode(ids[:cut]), loaded.decode(ids[cut + 1 :])
    assert first.startswith("A chat between a curious user")
    assert first.endswith(ends[0])
    assert ends[1][: len(head) + 20] in second


def test_the_picture_has_loss_rate_and_norm(report, tmp_path):
    lines = [
        metric_lines.TrainLine("t", i, 4, loss=4.0 / i, lr=1e-3 / i, grad_norm=1.0 * i) for i in range(1, 5)
    ]
    report.draw([*lines, metric_lines.EvalLine(4, 2.0)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_the_log(report, tmp_path):
    assert report.log_lines(tmp_path / "logs/train.log") == []
    ((_, text),) = report.of_training(tmp_path, [], [])
    assert "it was deleted, so there is no loss curve" in text


def test_report_shows_whole_paths(report, monkeypatch, capsys):
    """Those that are wider than the terminal, too."""
    monkeypatch.setenv("COLUMNS", "60")
    report.print_table([("text -> tokens", f"/{'long' * 20}/end")])
    printed = re.sub(r"[^\w./]", "", capsys.readouterr().out)
    assert "long" * 20 in printed
    assert "/end" in printed


def test_report_ends_well_when_the_log_was_deleted(report, tmp_path, monkeypatch, capsys):
    for name in ("held_out", "our_loss", "their_loss"):
        monkeypatch.setattr(report, name, lambda *args: 5.5)
    monkeypatch.setattr("sys.argv", ["quickstart_report.py", "--work", str(tmp_path)])
    report.main()
    assert "it was deleted" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "loss.png").exists()


# --- the environment

INSTALLER = """#!/usr/bin/env bash
case "$*" in
    -c*) exit "${OLD:-0}" ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pip"
        echo 'ACTIVE=yes' > "$3/bin/activate" ;;
    "-m pip "*) echo pip >> asked; exit "${BROKEN:-0}" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Sources tools/setup.sh in a shell with these options; returns the code of `source` and the output."""
    executable(tmp_path / "bin/python3", INSTALLER)
    executable(tmp_path / "tools/setup.sh", (launch.ROOT / "tools/setup.sh").read_text())
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()

    def go(options: str = "", before: str = "", **env: str) -> tuple[int, str]:
        bare = {name: value for name, value in os.environ.items() if name not in ("VENV", "PYTHON")}
        env |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        script = f'{options}{before}source "{tmp_path}/tools/setup.sh"; echo "code $? ${{ACTIVE:-no}}"'
        done = subprocess.run(
            ["bash", "-c", script], env=bare | env, cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    go.installed = tmp_path / ".venv/.installed"
    go.asked = tmp_path / "asked"
    return go


STRICT = "set -euo pipefail; "


@pytest.mark.parametrize("options", ["", STRICT])
def test_setup_installs_once(setup, options):
    assert setup(options)[0] == 0
    code, output = setup(options)
    assert (code, output) == (0, "code 0 yes\n")
    assert setup.asked.read_text() == "pip\n"


@pytest.mark.parametrize("options", ["", STRICT])
@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"BROKEN": "1"}, "error: the requirements could not be installed into .venv"),
        ({"OLD": "1"}, "error: python3 is missing or older than 3.11"),
        ({"PYTHON": "no-such-python"}, "error: no-such-python is missing or older than 3.11"),
    ],
)
def test_setup_that_fails_says_so_every_time_and_leaves_the_shell_open(setup, options, env, error):
    for _ in range(2):
        code, output = setup(options, **env)
        assert error in output
        assert code == (2 if options else 0)  # a strict script ends with it; a shell without options goes on
        assert ("code 2 no" in output) == (not options)
        assert not setup.installed.exists()


@pytest.mark.parametrize("image", ["cpu", "cuda", "npu"])
def test_setup_installs_nothing_in_a_container(image):
    """The images mark their environment as setup.sh does, at the place that it reads."""
    text = (launch.ROOT / f"docker/Dockerfile.{image}").read_text()
    wanted = re.search(r"wanted=\$\((.*)\)", (launch.ROOT / "tools/setup.sh").read_text())[1]
    assert f"RUN {wanted} > $VENV/.installed\n" in text
    assert text.index("pip install") < text.index(f"RUN {wanted}") < text.index("COPY . .")
    assert "ENV VENV=/opt/venv VIRTUAL_ENV=/opt/venv " in text


def test_setup_elsewhere(setup, tmp_path):
    code, output = setup(before="cd /; ")
    assert "error: tools/setup.sh is to be sourced in the root of the repository, not in /" in output
    assert "code 2 no" in output
    assert code == 0
