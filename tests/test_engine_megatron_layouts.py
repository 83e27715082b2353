"""The Megatron engine on every layout, and layouts by chance, against a plain torch loop: many steps.

All of it is slow. The default run has every kind of comparison and every control in a few layouts:
tests/test_engine_megatron.py.
"""

import random
from dataclasses import asdict, replace
from functools import partial

import pytest
from helpers.engines import Curve, worst
from helpers.layouts import CP, EP, PP, SP, TP, VPP
from helpers.megatron_themes import (
    DTYPES,
    ENGINES,
    GROUPED,
    LAYOUTS,
    MODEL,
    OVERLAP,
    RECOMPUTE,
    RUN,
    TIED,
    Case,
    Theme,
    architecture,
    case,
    compare,
    experts,
    half,
    losses,
    moved,
    poisoned,
    recomputed,
    reference,
    resumed,
    run,
    run_and_check,
    trained,
)
from helpers.moe import MODELS as MOE
from helpers.moe import loaded

from ascendspeed.cli import validation
from ascendspeed.config.schema import ModelConfig, ParallelConfig
from ascendspeed.models import param_mapping
from ascendspeed.utils.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_layout_equals_a_plain_torch_loop(world, tmp_path):
    run_and_check(world, losses(LAYOUTS[world]), tmp_path)


def by_chance(models: dict[str, ModelConfig], number: int, seed: int) -> dict[str, dict[str, Case]]:
    """model -> layout -> case, on four ranks: whatever the checks let through."""
    dice, chosen = random.Random(seed), {name: {} for name in models}
    sizes = {next(iter(axis)): (1, 1, 2, 4) for axis in (TP, PP, VPP, CP, EP)} | {"zero_stage": (0, 1, 2, 3)}
    flags = [*OVERLAP, *SP, "deepspeed"]
    while sum(map(len, chosen.values())) < number:
        name = dice.choice(list(models))
        parallel = {field: dice.choice(values) for field, values in sizes.items()} | {
            f: dice.random() < 0.5 for f in flags
        }
        parallel["sequence_parallel"] &= (
            parallel["tensor_model_parallel_size"] > 1
        )  # else it is switched off before
        train = dict(dice.choice(list(RECOMPUTE.values()))) | {"micro_batch_size": dice.choice((1, 2))}
        layout = ParallelConfig(**parallel)
        try:
            validation.check_run(
                replace(RUN, model=models[name], parallel=layout, train=replace(RUN.train, **train)), 4
            )
        except UserError:
            continue
        candidate = case(parallel, 3, train=train, evaluate=True)
        candidate["changes"]["model"] = asdict(models[name])
        changed = {k: v for k, v in (parallel | train).items() if v != vars(ParallelConfig()).get(k)}
        chosen[name][" ".join(f"{k}={v}" for k, v in changed.items())] = candidate
    return chosen


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_checks_let_through_has_the_same_curve(seed, tmp_path):
    models = {
        name: replace(MODEL, **fields)
        for name, fields in {"plain": {}, "tied": TIED, "grouped": GROUPED}.items()
    }
    models["mixtral"] = replace(MOE["mixtral"], num_layers=4)
    themes = {}
    for name, cases in by_chance(models, 16, seed).items():
        model = models[name]
        tensors = dict(param_mapping.random_tensors(model, RUN.train.seed))
        reference_model = loaded(model, tensors, tmp_path / name) if model.num_experts else reference(model)
        themes[name] = Theme(cases, partial(compare, trained(reference_model, model.vocab_size, 3)))
    for name, curves in run(4, themes, tmp_path / "run").items():
        themes[name].check(curves)


def test_experts_on_four_ranks(tmp_path):
    run_and_check(4, experts(4, tmp_path), tmp_path / "run")


@pytest.mark.parametrize("fields", [TIED, GROUPED], ids=["tied", "grouped"])
def test_other_architectures_on_every_layout(fields, tmp_path):
    run_and_check(2, architecture(fields, list(LAYOUTS[2]), 6), tmp_path)


def test_recomputation_on_every_layout(tmp_path):
    run_and_check(2, recomputed(["cp2", "tp2", "tp2 sp", "pp2", "pp2 vpp2", "dp2, shards"]), tmp_path)


def test_half_precision_on_every_layout(tmp_path):
    run_and_check(2, half(["cp2", "tp2 sp", "pp2 vpp2", "dp2"]), tmp_path)


def test_steps_that_are_not_finite_on_every_layout(tmp_path):
    run_and_check(
        2,
        poisoned([f"{name}, {kind}" for name in LAYOUTS[2] if name != "dp2, overlap" for kind in DTYPES]),
        tmp_path,
    )


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_resumes_bit_identically(world, tmp_path):
    run_and_check(world, resumed(LAYOUTS[world], tmp_path), tmp_path / "run")


def test_fp16_goes_on_with_its_loss_scale(tmp_path):
    """2^19 overflows three times; the checkpoint falls into the search, which does not restart."""
    at, fp16 = str(tmp_path / "ckpt"), {"fp16": True, "initial_loss_scale": 2.0**19}
    shards, stages = LAYOUTS[2]["dp2, shards"], LAYOUTS[2]["pp2"]
    cases = {"whole": case(shards, 6, optim=fp16), "first": case(shards, 2, optim=fp16, save=at)}
    cases |= {
        f"then {n}": case(p, 6, optim=fp16, first=2, load=at)
        for n, p in (("shards", shards), ("stages", stages))
    }

    def check(curves: dict[str, Curve]) -> None:
        assert [step == [None, None] for step in curves["whole"]] == [True, True, True, False, False, False]
        assert curves["first"] + curves["then shards"] == curves["whole"]
        assert curves["then stages"][0] == [None, None]
        assert worst(curves["then stages"][1:], curves["whole"][3:])[0] < 4e-4

    run_and_check(2, Theme(cases, check), tmp_path / "run")


def test_every_layout_goes_on_as_every_other(tmp_path):
    """Each hands over to the next, in a circle, and back."""
    zero = {"zero 2": ENGINES["zero 2"], "zero 3": ENGINES["zero 3"]}
    layouts = (
        LAYOUTS[4] | {f"tp2 {name}": TP | ENGINES[name] for name in ("zero 1", "zero 0", "zero 3")} | zero
    )
    names = list(layouts)
    pairs = [pair for a, b in zip(names, names[1:] + names[:1], strict=True) for pair in ((a, b), (b, a))]
    run_and_check(4, moved(pairs, layouts, tmp_path), tmp_path / "run")


def test_another_layout_goes_on_in_bf16(tmp_path):
    pairs = [("dp2, shards", "pp2"), ("pp2", "zero 1"), ("zero 3", "tp2 sp"), ("cp2", "dp2, shards")]
    run_and_check(2, moved(pairs, LAYOUTS[2] | ENGINES, tmp_path, "bf16"), tmp_path / "run")


def test_a_second_partition_within_a_node(tmp_path):
    """DeepSpeed's hierarchical ZeRO 3 and optimizer offload, by flags. One such partition per process."""
    zero = ENGINES["zero 3"]
    hpz, at = zero | {"zero_hpz_partition_size": 2}, str(tmp_path / "ckpt")
    run_and_check(
        4, losses({"zero 3": zero, "offload": zero | {"zero_offload": "cpu"}, "hpz": hpz}), tmp_path
    )
    cases = {"whole": case(hpz, 4), "first": case(hpz, 2, save=at), "then": case(hpz, 4, first=2, load=at)}
    curves = {
        name: run(4, {"one": Theme({name: one}, print)}, tmp_path / name)["one"][name]
        for name, one in cases.items()
    }
    assert curves["first"] + curves["then"] == curves["whole"]
