"""Preference tuning: losses, gradient norms and rewards against TRL's trainers, in every layout; the
reference."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import preference
from helpers.preference import (
    REWARD_TOKEN,
    STEPS,
    adapted_reward_model,
    curves,
    pairs_in_order,
    reward_curve,
    run_of,
    trl_curve,
    write_inputs,
)
from helpers.preference_cases import FEW, LAYOUTS, LORA, WITH_TOKEN, ZERO, case, with_lora, worst

from ascendspeed.cli.train_args import resolve
from ascendspeed.config.schema import PreferenceConfig
from ascendspeed.training.objectives.preference import LOSSES, Answers
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def dpo_by_trl(inputs):
    run = run_of(inputs)
    return lambda steps: trl_curve(run, steps, pairs_in_order(run, steps))


def test_one_engine_trains_as_a_loop_over_hugging_faces_model(inputs):
    """dpo, a reward model and its adapters, in one start of a process."""
    cases = {
        "dpo": case(2),
        "dpo swapped": {**case(2), "break": "pair swapped"},
        "rm": case(2, **WITH_TOKEN),
        "rm swapped": {**case(2, **WITH_TOKEN), "break": "pair swapped"},
        "rm lora": case(2, **WITH_TOKEN, lora=LORA),
    }
    run = run_of(inputs)
    adapted = adapted_reward_model(inputs, with_lora(run))
    expected = {
        "dpo": preference.torch_curve(run, 2, pairs_in_order(run, 2)),
        "rm": reward_curve(inputs, 2, REWARD_TOKEN),
        "rm lora": reward_curve(inputs, 2, REWARD_TOKEN, model=adapted),
    }
    for name, curve in curves(inputs, cases).items():
        values, norms = worst(curve, expected[name.removesuffix(" swapped")])
        if "swapped" in name:
            assert values > 1e-3, name  # control
        else:
            assert values < 1e-5, (name, curve, expected)
            assert norms < 1e-5, (name, norms)


@pytest.mark.slow
def test_both_engines_train_as_trl(inputs, dpo_by_trl):
    cases = {
        "megatron": case(),
        "deepspeed": case(parallel=ZERO),
        "swapped": {**case(steps=2), "break": "pair swapped"},
    }
    ours, expected = curves(inputs, cases), dpo_by_trl(FEW)
    assert expected[0][0] == pytest.approx(0.693147, abs=1e-6)  # the reference is the start: margins are 0
    for name in ("megatron", "deepspeed"):
        values, norms = worst(ours[name], expected)
        assert values < 1e-5, (name, ours[name], expected)
        assert norms < 1e-5, (name, norms)
    assert abs(ours["swapped"][1][0] - expected[1][0]) > 1e-2  # control


@pytest.mark.slow
def test_twenty_steps_as_trl(inputs, dpo_by_trl):
    ours = curves(inputs, {"megatron": case(STEPS), "deepspeed": case(STEPS, ZERO)})
    expected = dpo_by_trl(STEPS)
    for name, curve in ours.items():
        values, norms = worst(curve, expected)
        assert values < 1e-5, (name, values)
        assert norms < 1e-4, (name, norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    "groups", [{}, {"preference": {"loss": "kto"}}, {"lora": LORA}], ids=["dpo", "kto", "lora"]
)
def test_every_layout_gives_the_same_curve(inputs, groups):
    merged = {
        name: {**layout, "changes": {**layout["changes"], **groups}} for name, layout in LAYOUTS.items()
    }
    alone = curves(inputs, {"one": case(**groups)})["one"]
    for name, curve in curves(inputs, merged, 2).items():
        values, norms = worst(curve, alone)
        assert values < 1e-5, (name, curve, alone)
        assert norms < 1e-4, (name, curve, alone)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "orpo", "simpo", "kto"])
def test_other_losses_are_those_of_the_papers(inputs, loss):
    settings = {"loss": loss, "simpo_gamma": 0.7, "orpo_lambda": 0.4, "kto_desirable_weight": 1.3}
    cases = {"megatron": case(STEPS, preference=settings), "ds": case(STEPS, ZERO, preference=settings)}
    ours = curves(inputs, cases)
    run = replace(run_of(inputs), preference=PreferenceConfig(stage="dpo", beta=0.3, **settings))
    expected = preference.torch_curve(run, STEPS, pairs_in_order(run, STEPS))
    for curve in ours.values():
        values, norms = worst(curve, expected)
        assert values < 1e-5, (curve[-1], expected[-1])
        assert norms < 1e-4, norms


@pytest.mark.slow
def test_ipo_as_trl(inputs):
    run = run_of(inputs)
    ours = curves(inputs, {"ipo": case(STEPS, preference={"loss": "ipo"})})["ipo"]
    values, norms = worst(ours, trl_curve(run, STEPS, pairs_in_order(run, STEPS), loss_type=["ipo"]))
    assert values < 1e-5
    assert norms < 1e-4


@pytest.mark.slow
def test_adapters_as_trl_with_peft(inputs):
    ours = curves(inputs, {"lora": case(STEPS, lora=LORA), "zero": case(STEPS, ZERO, lora=LORA)})
    run = with_lora(run_of(inputs))
    expected = trl_curve(run, STEPS, pairs_in_order(run, STEPS))
    for curve in ours.values():
        values, norms = worst(curve, expected)
        assert values < 1e-5, (curve, expected)
        assert norms < 1e-4


@pytest.mark.slow
def test_packed_pairs_are_the_pairs(inputs):
    """All pairs in one global batch, one to a row or several: equal means over pairs."""
    rows = {"global_batch_size": preference.PAIRS}
    one = curves(inputs, {"one": case(2, train=rows)})["one"]
    packed = {"packing": "first-fit", "seq_length": 4096}
    for parallel in ({}, ZERO):
        changes = case(2, parallel, data=packed, train={"global_batch_size": 1})
        (curve,) = curves(inputs, {"packed": changes}).values()
        values, _ = worst(curve, one)
        assert values < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("groups", [{}, {"lora": LORA}], ids=["all", "lora"])
@pytest.mark.parametrize("parallel", [{}, ZERO], ids=["megatron", "deepspeed"])
def test_resumed_bit_by_bit(inputs, tmp_path, parallel, groups):
    first = {**case(2, parallel, **groups), "save": str(tmp_path / "ckpt")}
    second = case(2, parallel, **groups, train={"load": str(tmp_path / "ckpt"), "save": None})
    ours = curves(inputs, {"whole": case(4, parallel, **groups), "first": first, "second": second})
    assert ours["first"] + ours["second"] == ours["whole"]


# --- the losses themselves, and the reference


def test_formulas():
    """One pair, by hand."""
    chosen = Answers(torch.tensor([-2.0]), torch.tensor([4.0]), torch.tensor([-3.0]), baseline=0.5)
    rejected = Answers(torch.tensor([-5.0]), torch.tensor([2.0]), torch.tensor([-4.0]), baseline=0.25)
    settings = PreferenceConfig(
        stage="dpo",
        beta=0.5,
        dpo_label_smoothing=0.1,
        simpo_gamma=0.3,
        orpo_lambda=0.2,
        kto_desirable_weight=2.0,
        kto_undesirable_weight=3.0,
    )
    expected = {  # margins: log-ratios 1 and -1; means -0.5 and -2.5
        "dpo": 0.9 * 0.31326169 + 0.1 * 1.31326169,
        "ipo": (0.25 + 0.5 - 1.0) ** 2,
        "simpo": 0.9 * 0.40318605 + 0.1 * 1.10318605,
        "orpo": 0.5 + 0.2 * 0.05639188,
        "kto": (2.0 * (1 - 0.56217650) + 3.0 * (1 - 0.65135486)) / 2,
    }
    for name, loss in LOSSES.items():
        value, *rewards = loss(settings, chosen, rejected)
        assert value.item() == pytest.approx(expected[name], abs=1e-6), name
        assert rewards[0] > rewards[1]
        swapped = loss(settings, rejected, chosen)[0].item()
        assert abs(swapped - expected[name]) > 1e-2, name  # control


def test_a_reference_of_other_weights_or_data_is_refused(inputs, tmp_path, cpu):
    from ascendspeed.training import reference

    facts = {"weights": "a", "data": "b"}
    path = tmp_path / "p_reference.safetensors"
    path.write_bytes(reference.save({reference.TENSOR: torch.zeros(3, 2).numpy()}, facts))
    assert reference._read(path, facts).shape == (3, 2)
    for key, text in (("weights", "other weights"), ("data", "other data")):
        with pytest.raises(UserError, match=f"computed from {text}"):
            reference._read(path, {**facts, key: "c"})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="is damaged"):
        reference._read(path, facts)


REFUSED = {
    "--loss ipo": "belongs to --stage dpo",
    "--beta 0.2": "belongs to --stage dpo",
    "--stage dpo --simpo-gamma 1": "means nothing to --loss dpo, only to simpo",
    "--stage dpo --loss orpo --dpo-label-smoothing 0.1": "only to dpo and simpo",
    "--stage dpo --beta 0": "must be above 0",
    "--stage dpo --label-smoothing 0.1": "of pairs: --dpo-label-smoothing",
    "--stage dpo --z-loss-coeff 0.1": "trains on pairs",
    "--stage dpo --dpo-label-smoothing 0.5": "below 0.5",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_without_a_meaning_are_refused(flags):
    with pytest.raises(UserError, match=REFUSED[flags]):
        resolve(["--data-path", "x", *flags.split()], 1)


def test_the_settings_are_recorded():
    from ascendspeed.config import schema

    run, _ = resolve(["--data-path", "x", "--stage", "dpo", "--loss", "kto", "--dpo-beta", "0.2"], 1)
    assert (run.preference.loss, run.preference.beta) == ("kto", 0.2)
    assert schema.from_dict(json.loads(json.dumps(schema.to_dict(run)))) == run
