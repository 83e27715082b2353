"""Packed sequences against single documents through Hugging Face's model, under both engines; components."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch
from helpers.engines import Curve, worst
from helpers.layouts import A2A, CP, EP, PP, SHARDS, SP, TP, VPP
from helpers.moe import MIXTRAL
from helpers.packed_attention import GROUPED, INTERNLM, dense, positions
from helpers.packed_batches import (
    DEEP,
    FEW_STEPS,
    LENGTH,
    RUN,
    STEPS,
    ZERO,
    Batches,
    case,
    packed,
    trained,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed.checkpoint.discovery import open_checkpoint
from ascendspeed.config import schema
from ascendspeed.utils.errors import UserError

EXPERTS = replace(MIXTRAL, vocab_size=125)


# ---------------------------------------------------------------- the engines

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        **{f"zero {stage} dp2": ZERO[stage] for stage in (0, 2, 3)},
        "zero 1 tp2": ZERO[1] | TP,
        "zero 3 tp2 sp": ZERO[3] | TP | SP,
        "dp2, shards": SHARDS,
        "tp2": TP,
        "tp2 sp": TP | SP,
        "pp2": PP,
        "pp2 vpp2": PP | VPP,
        "cp2": CP,
        "cp2 a2a": CP | A2A,
        "zero 3 cp2 a2a": ZERO[3] | CP | A2A,
    },
    4: {
        "zero 3 tp2 dp2": ZERO[3] | TP,
        "tp2 cp2 sp": TP | CP | SP,
        "cp2 pp2 vpp2": CP | PP | VPP,
        "cp4": {"context_parallel_size": 4},
        "tp2 pp2": TP | PP,
    },
}
FAMILIES = {"internlm2": GROUPED, "mixtral": EXPERTS}
ELSEWHERE = {"internlm2": ("zero 1 tp2", "cp2"), "mixtral": ("zero 2 dp2", "ep2")}
RECOMPUTED = (("cp2", "full"), ("tp2 sp", "selective"))


def layouts_of(world: int, data: Path, folder: Path, steps: int = STEPS) -> dict[str, dict[str, Any]]:
    """Two layouts for a curve of `steps`, the others for the gradients of one step.

    With few steps, layouts that are a part of another case are left out.
    """
    cases = {}
    parts = ("zero 0 dp2", "tp2", "pp2", "cp2") if steps == FEW_STEPS else ()
    for name, layout in LAYOUTS[world].items():
        if name in parts:
            continue
        if name in ("zero 2 dp2", "pp2 vpp2"):
            cases[name] = case(layout, data, steps, evaluate=True)
        else:
            cases[f"{name}, first step"] = case(layout, data, 1, save=str(folder / "ckpt" / name))
    return cases


def others(data: Path) -> dict[str, dict[str, Any]]:
    """Cases of other families, bf16, and recomputation, whose second pass must draw equal dropout masks."""
    layouts, cases = LAYOUTS[2] | {"ep2": EP}, {}
    for family, model in FAMILIES.items():
        cases |= {f"{family}: {name}": case(layouts[name], data, 2, model) for name in ELSEWHERE[family]}
    for name, kind in RECOMPUTED:
        recompute, dropout = {"recompute_granularity": kind}, {"attention_dropout": 0.2}
        cases[f"{name}, {kind} recomputation"] = case(layouts[name], data, 1, train=recompute)
        cases[f"dropout, {name}"] = case(layouts[name], data, 1, train=dropout)
        cases[f"dropout, {name}, recomputed"] = case(layouts[name], data, 1, train=dropout | recompute)
    return cases | {
        f"bf16, {name}": case(layouts[name], data, 2, optim={"bf16": True}) for name in ("zero 2 dp2", "pp2")
    }


def controls(batches: Batches, data: Path) -> dict[str, dict[str, Any]]:
    """Mistakes that must be seen."""
    shifted = written(batches | {"loss_mask": batches["loss_mask"].roll(1, -1)}, data.with_name("shifted"))
    plain = torch.arange(LENGTH).expand_as(batches["position_ids"])
    unmarked = written(batches | {"position_ids": plain}, data.with_name("unmarked"))
    one_base, layouts, blind = (
        replace(DEEP, rope_scaling_type="none"),
        LAYOUTS[2],
        {"break": "documents see each other"},
    )
    return {
        "control: zero 2 dp2, mask shifted": case(layouts["zero 2 dp2"], shifted, 1),
        "control: zero 2 dp2, documents not marked": case(layouts["zero 2 dp2"], unmarked, 1),
        "control: cp2, documents not marked": case(layouts["cp2"], unmarked, 1),
        "control: deep cp2, base of the trained length": case(layouts["cp2"], data, 1, one_base),
        "control: zero 2 dp2, documents see each other": case(
            layouts["zero 2 dp2"], data, 1, **blind
        ),  # last: it stays
        "control: dp2, shards, documents see each other": case(layouts["dp2, shards"], data, 1, **blind),
    }


def check(curves: dict[str, Curve], folder: Path, steps: int) -> None:
    """1e-5 relative for losses and gradient norms in fp32; gradients per tensor; controls are off by more."""
    batches, rows = packed()
    shallow, deep = (trained(model, batches, rows, steps, folder / "hf") for model in (INTERNLM, DEEP))
    families = {name: trained(model, batches, rows, 2, folder / name)[0] for name, model in FAMILIES.items()}
    for name, curve in curves.items():
        family, _, _ = name.partition(": ")
        expected = families.get(family) or (deep if "vpp2" in name or "deep" in name else shallow)[0]
        part = expected[: len(curve)]
        if name.endswith(": evaluated"):
            assert curve[0][0] == pytest.approx(expected[0][0], rel=1e-6), name
        elif not name.startswith("dropout"):
            loss, norm = worst(curve, part)
            print(f"{name}: {loss:.1e} {norm:.1e}")
            if name.startswith("control"):
                assert loss > 5e-4, (name, loss)
            elif name.startswith("bf16"):
                assert 1e-6 < loss < 5e-3, (name, loss)
            else:
                assert max(loss, norm) < 1e-5, (name, loss, norm)
        elif name.endswith("recomputed"):
            assert curve == curves[name.removesuffix(", recomputed")], name
            assert worst(curve, part)[0] > 1e-3  # something was dropped
    checkpoints = list(folder.glob("ckpt/*"))
    assert len(checkpoints) == sum(name.endswith("first step") for name in curves)
    for saved in checkpoints:
        opened = open_checkpoint(saved)
        saved_moments = dict(opened.tensors("exp_avg"))
        moments = (deep if "vpp2" in saved.name else shallow)[1]
        assert saved_moments.keys() == moments.keys()
        for name, moment in moments.items():
            off = (saved_moments[name] - moment).abs().max() / moment.abs().max()
            assert off < 1e-5, (saved.name, name, float(off))


def run(world: int, cases: dict[str, dict[str, Any]], folder: Path, steps: int = STEPS) -> None:
    job = {"run": schema.to_dict(RUN), "steps": STEPS, "data_seed": 0, "cases": cases}
    check(launch.ranks(world, "engine_worker.py", job, folder / "ranks", timeout=900), folder, steps)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_packed_rows_train_as_documents_one_by_one(every, tmp_path):
    """Two ranks under ZeRO, TP, SP, PP, VPP, CP, EP and recomputation: losses, gradient norms, gradients."""
    batches, _ = packed()
    data = written(batches, tmp_path / "data")
    some = {
        name: case
        for name, case in others(data).items()
        if every or name in ("internlm2: cp2", "mixtral: ep2", "bf16, pp2")
    }
    cases = layouts_of(2, data, tmp_path, FEW_STEPS) | some | controls(batches, data)
    run(2, cases, tmp_path, FEW_STEPS)


@pytest.mark.slow
def test_packed_rows_train_as_documents_one_by_one_on_four_ranks(tmp_path):
    data = written(packed()[0], tmp_path / "data")
    cases = layouts_of(4, data, tmp_path) | {
        name: case(layout, data, STEPS) for name, layout in LAYOUTS[4].items()
    }
    run(4, cases, tmp_path)


@pytest.mark.slow
def test_packed_curves_of_every_layout(tmp_path):
    data = written(packed()[0], tmp_path / "data")
    run(2, {name: case(layout, data, STEPS) for name, layout in LAYOUTS[2].items()}, tmp_path)


def test_position_ids_say_where_documents_begin(cpu):
    from ascendspeed.models.gpt.packed_sequences import packed_sequences_of

    assert packed_sequences_of(positions([8], [8])) is None
    packed_rows = packed_sequences_of(positions([8], [3, 1, 4]))
    assert packed_rows.lengths == ((8,), (3, 1, 4))
    assert packed_rows.qkv_format == "sbhd"  # "thd" is megatron-core's own business
    bounds = packed_rows.bounds(torch.device("cpu"))
    assert (bounds.ends, bounds.cumulative.tolist(), bounds.longest) == (
        [8, 11, 12, 16],
        [0, 8, 11, 12, 16],
        8,
    )
    assert bounds.cumulative.dtype == torch.int32


@pytest.mark.parametrize("wrong", [[0, 1, 3, 0], [1, 2, 3, 4], [0, 1, 0, 0, 2], [0, 1, 2, 2]], ids=str)
def test_position_ids_that_do_not_count_up_are_refused(cpu, wrong):
    from ascendspeed.models.gpt.packed_sequences import packed_sequences_of

    with pytest.raises(
        UserError, match="position ids must count up, from 0 where a document begins: row 1 of the batch has"
    ):
        packed_sequences_of(torch.stack([torch.arange(len(wrong)), torch.tensor(wrong)]))


def inputs(rows: list[list[int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v in fp64 with 4 heads and 2 groups, and to which document each position belongs."""
    generator = torch.Generator().manual_seed(sum(n * n for row in rows for n in row))
    tensors = [
        torch.randn(len(rows), heads, sum(rows[0]), 8, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2)
    ]
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    return [x.requires_grad_() for x in tensors], ids


ROWS = st.lists(
    st.sets(st.integers(1, 23), max_size=8).map(lambda cuts: [0, *sorted(cuts), 24]), min_size=1, max_size=3
)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "dropout", [0.0, 1e-12]
)  # so small that nothing is dropped: the way of blocks, whose mask is shared
@settings(max_examples=8)
@given(edges=ROWS)
def test_attention_within_documents_equals_all_scores_masked(cpu, ranks, dropout, edges):
    """Values and gradients; a context-parallel rank has queries of two chunks; documents begin anywhere."""
    from ascendspeed.models.gpt.attention import attend_packed
    from ascendspeed.models.gpt.packed_sequences import PackedSequences
    from ascendspeed.models.gpt.sequence_shard import SequenceShard

    rows = [[b - a for a, b in pairwise(row)] for row in edges]
    (q, k, v), ids = inputs(rows)
    segments = PackedSequences(lengths=tuple(map(tuple, rows)), positions=positions(*rows))
    expected = dense(q, k, v, ids)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    back = torch.autograd.grad(expected, (q, k, v), gradient)
    gradients = [torch.zeros_like(x) for x in back]
    for share in (SequenceShard(rank, ranks) for rank in range(ranks)):
        out = attend_packed(segments, share.take(q, 2), k, v, share, dropout)
        # In these blocks the softmax is fp32, as everywhere with dropout.
        torch.testing.assert_close(out, share.take(expected, 2), rtol=0, atol=1e-6 if dropout else 1e-12)
        for sum_, part in zip(
            gradients, torch.autograd.grad(out, (q, k, v), share.take(gradient, 2)), strict=True
        ):
            sum_ += part
    for actual, right in zip(gradients, back, strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=1e-5 if dropout else 1e-12)


@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic", "llama3", "yarn"])
def test_documents_are_turned_as_if_alone(cpu, scaling):
    """And the tables are made once for all layers."""
    from ascendspeed.models.gpt.packed_sequences import packed_sequences_of
    from ascendspeed.models.gpt.rope import Rope
    from ascendspeed.models.gpt.sequence_shard import WHOLE_SEQUENCE, SequenceShard

    rope, rows = (
        Rope(
            replace(
                INTERNLM,
                rope_scaling_type=scaling,
                rope_scaling_factor=2.0,
                rope_original_max_position_embeddings=16,
            )
        ),
        ([40, 8], [3, 20, 24, 1]),
    )
    packed_rows, here = packed_sequences_of(positions(*rows)), torch.device("cpu")
    alone = [
        [torch.cat(parts) for parts in zip(*(rope.tables(n, torch.float32, here) for n in row), strict=True)]
        for row in rows
    ]
    whole = [torch.cat(column, 1) for column in zip(*alone, strict=True)]
    for share in (WHOLE_SEQUENCE, SequenceShard(0, 2), SequenceShard(1, 2)):
        actual = packed_rows.cos_sin(rope, torch.float32, here, share)
        assert actual is packed_rows.cos_sin(rope, torch.float32, here, share)
        for table, right in zip(actual, whole, strict=True):
            assert torch.equal(table.expand(-1, 2, -1, -1), share.take(right, 0))
    assert (
        rope.tables(40, torch.float32, here)[0][:20] != rope.tables(20, torch.float32, here)[0]
    ).any() == (scaling == "dynamic")
