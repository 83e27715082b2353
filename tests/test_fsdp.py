"""FSDP2 under the Megatron engine: curves of plain torch, resuming, and layouts of other engines."""

from functools import partial

import pytest
from helpers.megatron_themes import (
    CP,
    SHARDS,
    TP,
    Theme,
    compare,
    expected,
    moved,
    resumed,
    run_and_check,
)
from helpers.megatron_themes import case as case_of

from ascendspeed.cli.train_args import resolve
from ascendspeed.utils.errors import UserError

FSDP = {"use_torch_fsdp2": True}
LAYOUTS = {
    "fsdp": FSDP,
    "cp2 fsdp": CP | FSDP,
    "dp2, shards": SHARDS,
    "tp2": TP,
    "zero 3": {"deepspeed": True, "zero_stage": 3},
}


@pytest.mark.slow
def test_curves_equal_plain_torch(tmp_path):
    names = ("fsdp", "cp2 fsdp")
    cases = {name: case_of(LAYOUTS[name], 20) for name in names}
    cases["recomputed"] = case_of(FSDP, 20, train={"recompute_granularity": "full"})
    cases["control: decay"] = case_of(FSDP, 20, **{"break": "weight decay on all"})
    run_and_check(2, Theme(cases, partial(compare, expected())), tmp_path)


@pytest.mark.slow
def test_resumes_bit_identically(tmp_path):
    run_and_check(
        2, resumed({name: LAYOUTS[name] for name in ("fsdp", "cp2 fsdp")}, tmp_path), tmp_path / "r"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_other_layouts_continue_its_checkpoints_and_it_theirs(kind, tmp_path):
    others = ("dp2, shards", "tp2", "zero 3")
    pairs = [*(("fsdp", other) for other in others), *((other, "fsdp") for other in others)]
    theme = moved([*pairs, ("fsdp", "cp2 fsdp")], LAYOUTS, tmp_path, kind, mistakes=("moments",))
    run_and_check(2, theme, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tp 2", "does not go with --tensor-model-parallel-size 2; use 1"),
        ("--use-distributed-optimizer", "leave it out"),
        ("--fp16", "has no loss scale"),
        ("--optimizer muon", "use adamw"),
        ("--deepspeed", "use that"),
        ("--lora-rank 4 --quantization-bit 8", "leave --quantization-bit out"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message):
        resolve(["--data-path", "x", "--use-torch-fsdp2", *words.split()], 2)
