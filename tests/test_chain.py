"""Whole chain by user commands: data, weights, recipe, resume, damage, export; slow: the real launcher."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import launch
from helpers.chain import ITERS, STOP, command, forked_recipe, lines, prepare_tokens, recipe

from ascendspeed.training.metric_lines import EvalLine, TrainLine


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Text, tokens, a tiny random model, and its weights split for two ranks."""
    work = tmp_path_factory.mktemp("chain")
    prepare_tokens(work, rows=400)
    tokenizer = ("--tokenizer", work / "data" / "tokenizer")
    launch.must("tools/random_model.py", "--model", "internlm-tiny", *tokenizer, "--output-dir", work / "hf")
    launch.must(
        "tools/ckpt_convert/llama/convert_weights_from_huggingface.py",
        *("--input-model-dir", work / "hf", "--output-model-dir", work / "weights"),
        *("--tensor-model-parallel-size", 2, "--bias", "--deepspeed"),
    )
    return work


@pytest.fixture(scope="module")
def trained(work) -> Path:
    """A run that saves in the middle and at its end."""
    forked_recipe(work, "whole", work / "weights", SAVE_INTERVAL=str(STOP))
    return work


@pytest.fixture(scope="module")
def resumed(trained) -> str:
    """Output of a run that goes on from a copy of these checkpoints, the last of which is damaged."""
    return forked_recipe(trained, "broken", damaged_copy(trained, "broken"))


def damaged_copy(trained: Path, name: str) -> Path:
    """The checkpoints of the whole run in another folder, the last one with a changed bit."""
    shutil.copytree(trained / "whole", trained / name)
    newest = trained / name / f"step_{ITERS:07}" / "shard-00001-of-00002.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    return trained / name


def test_a_damaged_checkpoint_is_named_and_the_last_good_one_used(trained, resumed):
    assert re.search(rf"warning: .*step_{ITERS:07} is damaged: shard-00001-of-00002.safetensors", resumed)
    assert f"resumes from {trained / 'broken' / f'step_{STOP:07}'}: iteration {STOP}" in resumed


def logged(work: Path, name: str) -> list[tuple]:
    return [
        (line.iteration, line.loss, line.grad_norm, line.lr)
        if isinstance(line, TrainLine)
        else (line.iteration, line.loss)
        for line in lines(work, name)
    ]


@pytest.mark.slow
def test_the_real_launcher_goes_on_alike(trained, resumed):
    """DeepSpeed's launcher in place of the stand-in."""
    done = recipe(trained, "launched", damaged_copy(trained, "launched"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"resumes from {trained / 'launched' / f'step_{STOP:07}'}: iteration {STOP}" in done.stdout
    assert logged(trained, "launched") == logged(trained, "broken")


def test_a_resumed_run_has_the_same_curve_to_the_last_digit(trained, resumed):
    assert len(logged(trained, "whole")) == ITERS + 2
    assert len(logged(trained, "broken")) == ITERS - STOP + 1
    assert logged(trained, "broken") == [line for line in logged(trained, "whole") if line[0] > STOP]
    losses = [line.loss for line in lines(trained, "whole") if isinstance(line, TrainLine)]
    assert losses[-1] < losses[0] - 0.2


def test_the_export_has_our_loss_in_stock_transformers(cpu, trained, resumed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ascendspeed.config import schema
    from ascendspeed.data import dataset

    launch.must(
        "tools/ckpt_convert/convert.py",
        *("--from", trained / "broken", "--to", trained / "export", "--format", "hf-llama", "--verify"),
        *("--tokenizer", trained / "data" / "tokenizer"),
    )
    model = AutoModelForCausalLM.from_pretrained(trained / "export", dtype=torch.float32).eval()
    data = schema.DataConfig(data_path=(str(trained / "alpaca_text_document"),), seq_length=64)
    samples = dataset.build_splits(data, 1234, 2048, ["valid"])["valid"]
    batches = [batch for i in range(2) for batch in dataset.micro_batches(samples, 4 * i, 4, 4)]
    with torch.no_grad():
        logits = torch.cat([model(batch.tokens).logits for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    ours = next(line.loss for line in reversed(lines(trained, "broken")) if isinstance(line, EvalLine))
    assert expected == pytest.approx(ours, rel=1e-5)
    ids = AutoTokenizer.from_pretrained(trained / "export")(
        "a list of numbers", add_special_tokens=False
    ).input_ids
    assert ids
    assert max(ids) < 2048


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--modle", "x"), "error: unknown flag --modle; did you mean --model?"),
        (("--data-path", "nowhere"), "error: missing: --data-path nowhere (no file has this prefix"),
    ],
)
def test_a_wrong_flag_ends_the_launcher_with_one_line_and_code_2(work, flags, message):
    done = recipe(work, "wrong", work / "weights", *flags)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output[-2000:]
    assert output.count(message) == 1
    assert "Traceback" not in output
    assert not (work / "wrong").exists()


def entry(work: Path, name: str, processes: int, *flags: str) -> subprocess.CompletedProcess:
    """pretrain_intern.py itself under torchrun."""
    return command(
        *(
            "torchrun",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            str(launch.free_port()),
            "--",
            "pretrain_intern.py",
        ),
        *(
            "--model",
            "internlm-tiny",
            "--load",
            str(work / "hf"),
            "--data-path",
            str(work / "alpaca_text_document"),
        ),
        *(
            "--seq-length",
            "64",
            "--micro-batch-size",
            "1",
            "--global-batch-size",
            "4",
            "--train-iters",
            str(ITERS),
        ),
        *(
            "--lr",
            "1e-2",
            "--eval-interval",
            "3",
            "--eval-iters",
            "2",
            "--log-dir",
            str(work / f"{name}.log"),
            *flags,
        ),
    )


@pytest.mark.slow
def test_the_entry_without_deepspeed(work):
    """Stages, chunks of sequences and shards of the optimizer give ZeRO's curve, and go on as each other."""
    layouts: dict[str, tuple[int, tuple[str, ...]]] = {
        "zero": (1, ("--deepspeed", "--zero-stage", "1")),
        "pipeline": (
            4,
            ("--tp", "2", "--pp", "2", "--sequence-parallel", "--num-layers-per-virtual-pipeline-stage", "1"),
        ),
        "context": (2, ("--cp", "2", "--use-distributed-optimizer")),
    }
    curves = {}
    for name, (processes, flags) in layouts.items():
        done = entry(work, name, processes, *flags)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        curves[name] = [line.loss for line in lines(work, name)]
        assert curves[name] == pytest.approx(curves["zero"], rel=1e-5), name
    assert len(curves["zero"]) == ITERS + 2
    save = ("--save", str(work / "moving"))
    first = entry(work, "first", 2, "--pp", "2", "--exit-interval", str(STOP), *save)
    then = entry(work, "then", 2, "--deepspeed", "--zero-stage", "3", *save, "--auto-resume")
    assert (first.returncode, then.returncode) == (0, 0), first.stderr[-2000:] + then.stderr[-2000:]
    moved = [line.loss for name in ("first", "then") for line in lines(work, name)]
    assert moved == pytest.approx(curves["zero"], rel=1e-5)
    refused = entry(work, "refused", 2, "--pp", "2", "--deepspeed")
    assert refused.returncode != 0
    assert "error: --pipeline-model-parallel-size 2: the DeepSpeed engine has no" in refused.stderr
