"""Every size by its name through the recipe: real ones up to the checks, tiny ones through training."""

import os
import subprocess

import pytest
from helpers import launch, recipes
from helpers.chain import TrainLine, lines, prepare_tokens, recipe

from ascendspeed.cli import validation
from ascendspeed.cli.train_args import resolve
from ascendspeed.config.schema import DataConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models.families import PRESETS
from ascendspeed.utils.errors import UserError

TINY = [name for name, model in PRESETS.items() if name.endswith("-tiny") and model.num_experts is None]


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_passes_the_checks(name):
    data, optim = DataConfig(data_path=("x",)), OptimConfig()
    validation.check_run(
        Run(PRESETS[name], ParallelConfig(deepspeed=True), optim, data, TrainConfig(global_batch_size=8)), 8
    )


@pytest.mark.breadth
@pytest.mark.parametrize("name", ["internlm2-7b", "internlm2.5-20b", "internlm3-8b", "gemma-7b"])
def test_the_script_takes_every_name(name, tmp_path):
    """The command that the script would start is parsed as the program parses it."""
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    env = launch.environment(
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", MODEL=name, CHECKPOINT="", NPROC="8"
    )
    words = subprocess.run(
        ["bash", str(recipes.INTERN / "pretrain_internlm_7b_zero.sh")],
        env=env,
        cwd=recipes.inputs(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    run, _ = resolve(words[words.index("pretrain_intern.py") + 1 :], 8)
    assert run.model == PRESETS[name]


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--swiglu", "activation gelu-tanh"), ("--untie-embeddings-and-output-weights", "ties its embeddings")],
)
def test_a_flag_that_says_what_the_model_is_not_is_refused(flag, message):
    words = ["--deepspeed", "--data-path", "x", flag]
    with pytest.raises(UserError, match=f"{flag}.*{message}"):
        resolve([*words, "--model", "gemma-2b"], 1)
    resolve([*words, "--model", "internlm2-tiny"], 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Tokens."""
    work = tmp_path_factory.mktemp("recipe")
    prepare_tokens(work, rows=200)
    return work


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_recipe_trains_it(work, name):
    """From random weights, on two processes under tensor parallel; in test_chain.py: internlm-tiny."""
    done = recipe(work, name, work, MODEL=name, CHECKPOINT="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [line.loss for line in lines(work, name) if isinstance(line, TrainLine)]
    assert losses[-1] < losses[0] - 0.2
