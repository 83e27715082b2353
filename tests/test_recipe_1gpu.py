"""The 7B recipe for one GPU: the published run of the 7B recipe, in the engine and micro-batch that fit."""

from dataclasses import replace

import pytest
from helpers import recipes

from ascendspeed.cli.train_args import resolve
from ascendspeed.models import estimates


@pytest.fixture
def resolved(tmp_path):
    """Run of a 7B recipe by its name; a recipe that starts one process starts the program itself."""
    program = tmp_path / "pretrain_intern.py"
    program.write_text(
        "import os, sys\n"
        "assert 'WORLD_SIZE' not in os.environ\n"
        "open('words', 'w').write('\\n'.join([sys.argv[0], *sys.argv[1:]]))\n"
    )

    def go(name: str, **env: str):
        recipe = recipes.INTERN / f"pretrain_internlm_7b_{name}.sh"
        return resolve(recipes.typed(recipe, tmp_path, **env), 1)[0]

    return go


def test_it_is_the_published_run_in_the_engine_that_fits(resolved):
    run, published = resolved("1gpu"), resolved("zero")
    assert not run.parallel.deepspeed
    assert (run.train.micro_batch_size, run.train.recompute_granularity) == (1, "none")
    assert (run.model, run.optim, run.data) == (published.model, published.optim, published.data)
    assert run.train.global_batch_size == published.train.global_batch_size == 256
    same = replace(run.train, micro_batch_size=2, save_interval=published.train.save_interval)
    assert same == published.train


def test_its_model_states_are_what_it_says(resolved):
    run = resolved("1gpu")
    states = estimates.model_states(
        run.model, run.parallel, data_parallel=1, dtype="bf16", fp32_gradients=True
    )
    assert states.total / estimates.parameters_per_device(run.model, run.parallel) == 18
    text = (recipes.INTERN / "pretrain_internlm_7b_1gpu.sh").read_text()
    assert f"{states.total / 2**30:.1f} GiB of model states" in text


def test_its_values_come_from_the_environment(resolved):
    assert resolved("1gpu", MICRO_BATCH="4").train.micro_batch_size == 4
