"""Learning rate against megatron.core's scheduler, driven as by Megatron-LM: in samples, skips left out."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ascendspeed.config import lr_schedule
from ascendspeed.config.schema import OptimConfig
from ascendspeed.utils.errors import UserError

RECIPE = OptimConfig(lr=1.5e-4, min_lr=1e-5, lr_decay_iters=320, lr_warmup_fraction=0.01)


class StandIn:
    """All that the scheduler asks of an optimizer."""

    def __init__(self):
        self.param_groups = [{"lr": None}]


def megatron_curve(
    optim: OptimConfig, train_iters: int, batch: int, skipped: set[int] = frozenset()
) -> list[float]:
    """The learning rate that each iteration's optimizer step uses."""
    decay = (train_iters if optim.lr_decay_iters is None else optim.lr_decay_iters) * batch
    final = (optim.lr_wsd_decay_iters or 0) * batch
    fraction = optim.lr_warmup_fraction
    optimizer = StandIn()
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_iters * batch if fraction is None else fraction * decay,
        lr_decay_steps=decay,
        lr_decay_style=optim.lr_decay_style,
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=train_iters * batch,
        wd_incr_style="constant",
        wsd_decay_steps=final,
        lr_wsd_decay_style=optim.lr_wsd_decay_style,
    )
    curve = []
    for iteration in range(train_iters):
        curve.append(optimizer.param_groups[0]["lr"])
        if iteration not in skipped:
            scheduler.step(increment=batch)
    return curve


def our_curve(optim: OptimConfig, train_iters: int) -> list[float]:
    return [lr_schedule.lr_at(i, optim, train_iters) for i in range(train_iters)]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lr_warmup_fraction": None},
        {"lr_warmup_fraction": None, "lr_warmup_iters": 7},
        {"lr_warmup_fraction": 0.37},
        {"lr_warmup_fraction": 0.0},
        {"lr_decay_iters": None},
        {"lr_decay_iters": 90, "lr_warmup_fraction": 0.1},
        {"lr": 1e-6, "min_lr": 1e-6},
        {"min_lr": 0.0},
    ],
    ids=str,
)
def test_equals_megatron(style, change):
    optim = dataclasses.replace(RECIPE, lr_decay_style=style, **change)
    lr_schedule.check(optim, 400)
    assert our_curve(optim, 400) == pytest.approx(megatron_curve(optim, 400, batch=256), rel=1e-12, abs=0)


WSD = dataclasses.replace(RECIPE, lr_decay_style="WSD", lr_wsd_decay_iters=64)


@pytest.mark.parametrize("style", ["exponential", "linear", "cosine", "minus_sqrt"])
@pytest.mark.parametrize("change", [{}, {"lr_wsd_decay_iters": 316}, {"lr_decay_iters": None}], ids=str)
def test_wsd_equals_megatron(style, change):
    optim = dataclasses.replace(WSD, lr_wsd_decay_style=style, **change)
    lr_schedule.check(optim, 400)
    expected = megatron_curve(optim, 400, batch=256)
    assert our_curve(optim, 400) == pytest.approx(expected, rel=1e-12, abs=0)
    late = dataclasses.replace(optim, lr_wsd_decay_iters=optim.lr_wsd_decay_iters - 1)
    assert our_curve(late, 400) != pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("change", [{}, {"lr_warmup_fraction": None}, {"min_lr": 5e-5}], ids=str)
def test_inverse_square_root_equals_megatron(change):
    """Megatron's warmup of 0 counts as one sample there: compare a batch of one."""
    optim = dataclasses.replace(RECIPE, lr_decay_style="inverse-square-root", **change)
    batch = 1 if optim.lr_warmup_fraction is None else 256
    assert our_curve(optim, 400) == pytest.approx(megatron_curve(optim, 400, batch), rel=1e-12, abs=0)


def test_a_decay_forks_from_any_iteration():
    """Another length changes nothing before the decay begins: a checkpoint of the stable phase continues."""
    long = our_curve(dataclasses.replace(WSD, lr_decay_iters=400), 400)
    fork = our_curve(dataclasses.replace(WSD, lr_decay_iters=200, lr_warmup_fraction=0.02), 200)
    assert fork[:136] == long[:136]
    assert fork[137] < long[137]
    assert fork[-1] < 1.1 * WSD.min_lr + (WSD.lr - WSD.min_lr) / 60


@settings(max_examples=60, deadline=None)
@given(
    style=st.sampled_from(["cosine", "linear", "constant"]),
    train_iters=st.integers(1, 120),
    decay=st.none() | st.integers(1, 150),
    warmup=st.integers(0, 40) | st.floats(0, 0.99),
    lr=st.floats(1e-6, 1e-2),
    share=st.floats(0, 1),
    batch=st.sampled_from([1, 3, 64, 256]),
)
def test_equals_megatron_anywhere(style, train_iters, decay, warmup, lr, share, batch):
    given_as = {"lr_warmup_iters": warmup} if isinstance(warmup, int) else {"lr_warmup_fraction": warmup}
    optim = OptimConfig(lr=lr, min_lr=lr * share, lr_decay_style=style, lr_decay_iters=decay, **given_as)
    try:
        lr_schedule.check(optim, train_iters)
    except UserError:
        assert isinstance(warmup, int)
        assert warmup >= (decay or train_iters)  # the one thing that can be wrong here
        return
    # here a fraction is multiplied by iterations, there by samples: the last bit may be rounded differently
    assert our_curve(optim, train_iters) == pytest.approx(
        megatron_curve(optim, train_iters, batch), rel=1e-12, abs=0
    )


def test_control_one_step_late_is_seen():
    late = [lr_schedule.lr_at(i + 1, RECIPE, 400) for i in range(400)]
    assert late != pytest.approx(megatron_curve(RECIPE, 400, batch=256), rel=1e-12, abs=0)


def test_skipped_steps_do_not_move_it():
    skipped, done, ours = {0, 1, 5, 6, 50}, 0, []
    for iteration in range(80):
        ours.append(lr_schedule.lr_at(done, RECIPE, 80))
        done += iteration not in skipped
    assert ours == pytest.approx(megatron_curve(RECIPE, 80, 64, skipped), rel=1e-12, abs=0)


def test_first_step():
    assert lr_schedule.lr_at(0, RECIPE, 400) == 0.0
    assert lr_schedule.lr_at(0, dataclasses.replace(RECIPE, lr_warmup_fraction=None), 400) == RECIPE.lr
    assert lr_schedule.lr_at(10**9, RECIPE, 400) == RECIPE.min_lr


@pytest.mark.parametrize(
    ("change", "train_iters", "message"),
    [
        ({"lr_warmup_iters": 5}, 400, "not both"),
        ({"lr_warmup_fraction": 1.0}, 400, "below 1"),
        ({"lr_warmup_fraction": -0.1}, 400, "at least 0"),
        ({"lr_warmup_fraction": float("nan")}, 400, "at least 0"),
        ({"lr_warmup_fraction": None, "lr_warmup_iters": -1}, 400, "must not be negative"),
        ({"lr_warmup_fraction": None, "lr_warmup_iters": 320}, 400, "--lr-decay-iters 320"),
        ({"lr_warmup_fraction": None, "lr_warmup_iters": 50, "lr_decay_iters": None}, 50, "--train-iters 50"),
        ({"lr": 1e-6}, 400, "--min-lr 1e-05 is above --lr 1e-06"),
        ({"lr": -1.0}, 400, "--lr -1"),
        ({"lr": float("nan")}, 400, "--lr nan"),
        ({"min_lr": -1.0}, 400, "--min-lr -1"),
        ({"lr_decay_iters": 0}, 400, "--lr-decay-iters 0"),
        ({}, 0, "--train-iters 0"),
        ({"lr_wsd_decay_iters": 5}, 400, "belongs to --lr-decay-style WSD"),
        ({"lr_decay_style": "WSD"}, 400, "set --lr-wsd-decay-iters"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 0}, 400, "choose 1 to 316.8"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 317}, 400, "choose 1 to 316.8"),
        ({"lr_decay_samples": 5}, 400, "a run of --train-iters takes --lr-decay-iters"),
        ({"lr_warmup_samples": 5}, 400, "a run of --train-iters takes --lr-warmup-iters"),
    ],
)
def test_refusals(change, train_iters, message):
    with pytest.raises(UserError) as error:
        lr_schedule.check(dataclasses.replace(RECIPE, **change), train_iters)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_constant_needs_no_minimum():
    lr_schedule.check(OptimConfig(lr=1e-6, min_lr=1e-5, lr_decay_style="constant"), 10)
