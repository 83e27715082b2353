"""Batch-size ramps, runs by samples, skipped iterations and mock data."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import oracle
from helpers.engines import DATA_SEED, MODEL, RUN, run_cases, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ascendspeed.cli.train_args import resolve
from ascendspeed.config import batch_schedule, schema
from ascendspeed.config.batch_schedule import batch_size_at, is_skipped, iterations_of
from ascendspeed.config.lr_schedule import Schedule, lr_at
from ascendspeed.config.schema import MOCK_DATA, DataConfig, TrainConfig
from ascendspeed.data import dataset
from ascendspeed.models import param_mapping
from ascendspeed.utils.errors import UserError

WORDS = ["--mock-data", "--model", "internlm-tiny", "--seq-length", "64"]
RAMP = ["--train-samples", "400", "--global-batch-size", "16", "--rampup-batch-size", "4", "4", "60"]


@settings(max_examples=80, deadline=None)
@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 8),
    steps=st.integers(1, 6),
    ramp=st.integers(1, 300),
    samples=st.integers(50, 900),
)
def test_ramp_equals_megatron(start, increment, steps, ramp, samples):
    full = start + steps * increment
    train = TrainConfig(
        global_batch_size=full, rampup_batch_size=(start, increment, ramp), train_samples=samples
    )
    batch_schedule.check_rampup(train)
    calculator = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, start, increment, ramp)
    consumed = iterations = 0
    while consumed <= min(ramp, samples):  # as Megatron-LM's update_train_iters
        calculator.update(consumed, False)
        assert batch_size_at(train, consumed) == calculator.current_global_batch_size
        consumed += calculator.current_global_batch_size
        iterations += 1
    iterations += (samples - consumed) // full if samples > consumed else 0
    assert iterations_of(train, samples) == iterations


def test_a_ramp_of_many_samples_takes_no_loop_over_them():
    train = TrainConfig(global_batch_size=2, rampup_batch_size=(1, 1, 10**12), train_samples=10**13)
    assert iterations_of(train, 10**13) == 10**12 + 1 + (9 * 10**12 - 1) // 2
    with pytest.raises(UserError, match="more than 10,000 batch sizes"):
        batch_schedule.check_rampup(replace(train, global_batch_size=2 * 10**9))


def test_schedule_in_samples_equals_megatron():
    """Learning rates of a run with a ramp and skipped iterations, all points."""
    run, _ = resolve(
        [*WORDS, *RAMP, "--lr-warmup-samples", "40", "--lr-decay-samples", "300", "--lr", "1e-3"], 1
    )
    optimizer = type("StandIn", (), {"param_groups": [{}]})
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, 1e-3, run.optim.min_lr, 40, 300, "cosine", 0.0, 0.0, 400, "constant"
    )
    samples = done = 0
    for iteration in range(run.train.train_iters):
        assert Schedule.of(run).lr(done) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        size = batch_size_at(run.train, samples)
        samples += size
        if iteration not in (2, 9):
            scheduler.step(size)
            done += size
    assert 400 - 16 < samples <= 400


def test_skips_are_parsed():
    train = TrainConfig(iterations_to_skip=(5,), skip_batches="1, 3-4")
    assert [i for i in range(8) if is_skipped(train, i)] == [1, 3, 4, 5]
    for text in ("x", "4-3", "1--2", "-1"):
        with pytest.raises(UserError, match="--skip-batches"):
            batch_schedule.skipped_iterations(TrainConfig(skip_batches=text))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train-samples", "10", "--train-iters", "3"], "--train-samples 10 and --train-iters 3"),
        (["--train-samples", "10", "--global-batch-size", "16"], "not one global batch"),
        (["--rampup-batch-size", "4", "4", "60", "--global-batch-size", "16"], "--train-samples"),
        ([*RAMP[:5], "4", "5", "60"], "divides 12"),
        ([*RAMP[:5], "20", "4", "60"], "START is above --global-batch-size 16"),
        ([*RAMP[:5], "3", "1", "60", "--micro-batch-size", "2"], "15 .of --rampup-batch-size. is not a"),
        ([*RAMP, "--lr-decay-iters", "5"], "takes --lr-decay-samples"),
        (["--rampup-batch-size-iters", "4", "5", "3", "--global-batch-size", "16"], "divides 12"),
        ([*RAMP, "--rampup-batch-size-iters", "4", "4", "3"], "give one of them"),
        (["--rampup-batch-size-iters", "4", "0", "3", "--global-batch-size", "16"], "ITERATIONS must be"),
        (["--rampup-batch-size-iters", "1", "1", "3", "--train-epochs", "1"], "does not go with"),
        (["--iterations-to-skip", "-1"], "must be 0 or more"),
        (["--data-path", "x"], "leave them out"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message):
        resolve([*WORDS, *words], 1)


def test_run_json_keeps_the_settings():
    run, _ = resolve([*WORDS, *RAMP, "--iterations-to-skip", "3", "4", "--skip-batches", "7-8"], 1)
    assert schema.from_dict(json.loads(json.dumps(schema.to_dict(run)))) == run
    assert run.data.data_path == (MOCK_DATA,)


def test_mock_data_are_a_function_of_seed_split_and_number():
    data = DataConfig((MOCK_DATA,), seq_length=16)
    first, again = (dataset.build_splits(data, 7, 50, ["train", "valid"]) for _ in range(2))
    other = dataset.build_splits(data, 8, 50, ["train"])
    sample = first["train"].sample(123456)
    assert all(torch.equal(a, b) for a, b in zip(sample, again["train"].sample(123456), strict=True))
    assert torch.equal(sample[0][1:], sample[1][:-1])
    assert 0 <= int(sample[0].min()) <= int(sample[0].max()) < 50
    for different in (first["valid"].sample(123456), other["train"].sample(123456), first["train"].sample(1)):
        assert not torch.equal(sample[0], different[0])


def test_sizes_of_a_replaced_ramp():
    train = TrainConfig(global_batch_size=16, rampup_batch_size=(4, 4, 60), train_samples=400)
    assert batch_schedule.batch_sizes(train) == (4, 8, 12, 16)
    assert batch_schedule.batch_sizes(replace(train, rampup_batch_size=None)) == (16,)


SIZES = [2, 4, 8, 8, 4]


def ramp_cases(stages) -> dict:
    optim = {"clip_grad": 0.0}
    zero = {
        f"zero {stage}": {"changes": {"parallel": {"zero_stage": stage}, "optim": optim}, "sizes": SIZES}
        for stage in stages
    }
    megatron = {"changes": {"parallel": {"deepspeed": False}, "optim": optim}, "sizes": SIZES}
    return zero | {"megatron": megatron, "control: one size": megatron | {"sizes": [8] * len(SIZES)}}


@pytest.mark.parametrize("stages", [(2,), pytest.param((0, 1, 3), marks=pytest.mark.slow)])
def test_engines_train_with_batches_of_different_sizes(stages, tmp_path):
    """Both engines on two ranks: a plain torch loop's curve, whatever the number of micro-batches."""
    steps = len(SIZES)
    batches = oracle.batches(MODEL.vocab_size, steps, 8, RUN.data.seq_length, DATA_SEED)
    short = [{k: v[:n] for k, v in batch.items()} for batch, n in zip(batches, SIZES, strict=True)]
    lrs = [lr_at(i, RUN.optim, RUN.train.train_iters) for i in range(steps)]
    reference = oracle.hugging_face(MODEL, dict(param_mapping.random_tensors(MODEL, RUN.train.seed)))
    expected = oracle.train(reference, short, lrs, vars(replace(RUN.optim, clip_grad=0.0)))
    curves = run_cases(
        "tp1-dp2", ramp_cases(stages), tmp_path, steps, train_iters=RUN.train.train_iters, global_batch_size=8
    )
    for name, curve in curves.items():
        loss, norm = worst(curve, expected)
        print(f"{name}: {loss:.1e} {norm:.1e}")
        assert (loss > 1e-3) if "control" in name else (loss < 1e-5 and norm < 1e-5), name
