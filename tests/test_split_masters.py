"""fp32 masters as bf16 weights and 16 further bits: exact, and equal to kept masters in every step."""

from dataclasses import replace

import pytest
import torch
from helpers import engine_worker, launch
from helpers.engines import DATA_SEED, MODEL, RUN

from ascendspeed.checkpoint.discovery import open_checkpoint
from ascendspeed.checkpoint.fragment import TrainState
from ascendspeed.checkpoint.save import save_checkpoint
from ascendspeed.cli.train_args import resolve
from ascendspeed.config import schema
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.models.param_mapping import random_tensors
from ascendspeed.training.engines import split_masters
from ascendspeed.training.engines.split_masters import SplitAdamW, join_master, split_master
from ascendspeed.utils.errors import UserError

STEPS, HALF = 4, 2
SPLIT = {"bf16": True, "store_param_remainders": True}
MEGATRON = {"deepspeed": False, "zero_stage": 2}
DISTRIBUTED = MEGATRON | {"use_distributed_optimizer": True}


def split(numbers):
    weight, remainder = (torch.empty(numbers.shape, dtype=t) for t in (torch.bfloat16, torch.int16))
    split_master(numbers, weight, remainder)
    return weight, remainder


def test_every_finite_number_is_exact():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator).to(torch.int32)
    numbers = bits.view(torch.float32)
    numbers = numbers[numbers.isfinite()]
    weight, remainder = split(numbers)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), numbers.view(torch.int32))
    assert not torch.equal(join_master(weight, torch.zeros_like(remainder)), numbers)  # control
    tie = (numbers.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.any()
    assert torch.equal(weight[~tie], numbers[~tie].bfloat16())


def test_ties_are_rounded_away_from_zero():
    ulp = 2.0**-7
    numbers = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, -1 - ulp / 2, -1 - 3 * ulp / 2])
    assert split(numbers)[0].tolist() == [1 + ulp, 1 + 2 * ulp, -1 - ulp, -1 - 2 * ulp]
    assert numbers.bfloat16().tolist() == [1, 1 + 2 * ulp, -1, -1 - 2 * ulp]  # torch's


def new_adamw(kind, weights, masters):
    """An AdamW of two groups, built as the engine does."""
    adamw = kind([{"params": [], "weight_decay": d} for d in (0.1, 0.0)], lr=1e-3, eps=1e-8, fused=True)
    if kind is SplitAdamW:
        adamw.split(zip(weights, masters, strict=True))
    for group, master in zip(adamw.param_groups, masters, strict=True):
        group["params"] = [master]
        moments = {name: torch.zeros(master.shape) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[master].update(moments, step=torch.zeros(()))
    return adamw


@pytest.mark.parametrize("chunk", [1024, 2**24])
def test_updates_equal_those_of_kept_masters(chunk, monkeypatch):
    """Bit for bit, in chunks too; without the remainders, they differ."""
    monkeypatch.setattr(split_masters, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator).bfloat16() for shape in ((37, 100), (5,))]
    kept = [weight.float() for weight in weights]
    ours = [weight.float() for weight in weights]
    control = [weight.float() for weight in weights]
    reference = new_adamw(torch.optim.AdamW, weights, kept)
    adamw = new_adamw(SplitAdamW, weights, ours)
    forgetful = new_adamw(SplitAdamW, [weight.clone() for weight in weights], control)
    assert [master.untyped_storage().nbytes() for master in ours] == [4, 4]
    for _ in range(20):
        for masters in zip(kept, ours, control, strict=True):
            gradient = torch.randn(masters[0].shape, generator=generator)
            for master in masters:
                master.grad = gradient.clone()
        for optimizer in (reference, adamw, forgetful):
            optimizer.step()
        for remainder in forgetful.remainders:
            remainder.zero_()
    for weight, master, joined, forgotten in zip(weights, kept, ours, control, strict=True):
        assert torch.equal(adamw.read(joined), master)
        assert torch.equal(weight, split(master)[0])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(adamw.state[joined][name], reference.state[master][name])
        assert not torch.equal(forgetful.read(forgotten), master)


def new_engine(cpu, grid, is_split, tensors, **parallel):
    """An engine in this process, with split masters or with kept ones that are rounded alike."""
    from ascendspeed.training.engines.megatron import MegatronEngine

    optim = replace(RUN.optim, bf16=True, store_param_remainders=is_split)
    run = replace(RUN, parallel=schema.ParallelConfig(**parallel), optim=optim)
    engine = MegatronEngine(run, grid, cpu, Kernels(), tensors)
    if not is_split:
        for chained in engine.optimizer.chained_optimizers:
            engine_worker.round_half_away(chained)
    return engine


def steps(engine, first, last):
    """[(loss, norm), ...] of steps over other tokens each."""
    from ascendspeed.data.dataset import Batch

    curve = []
    for number in range(first, last):
        tokens = torch.randint(125, (4, 33), generator=torch.Generator().manual_seed(number))
        position = torch.arange(32)[None]
        rows = [Batch(r[None, :-1], r[None, 1:], torch.ones(1, 32), position) for r in tokens]
        result = engine.step(rows, 1e-2)
        curve.append((result.loss, result.grad_norm))
    return curve


@pytest.mark.parametrize(
    "parallel", [{"use_distributed_optimizer": True}, pytest.param({}, marks=pytest.mark.slow)], ids=str
)
def test_an_engine_equals_one_with_kept_masters(cpu, tmp_path, parallel):
    """Losses and norms, and resumed from a checkpoint of the other kind; the same bytes in both."""
    from ascendspeed.distributed import process_groups

    grid = process_groups.initialize(cpu, schema.ParallelConfig(), 1)
    curves, saved = {}, {}
    for is_split in (True, False):
        engine = new_engine(cpu, grid, is_split, random_tensors(MODEL, 1), **parallel)
        curves[is_split] = steps(engine, 0, HALF)
        state = TrainState(HALF, 0, 0, engine.scalars())
        folder = tmp_path / str(is_split)
        save_checkpoint(folder, state, engine.run, engine.fragments(), engine.rng(), 0, 1, lambda: None)
        saved[is_split] = open_checkpoint(str(folder))
        curves[is_split] += steps(engine, HALF, STEPS)
    assert curves[True] == curves[False]
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        for (name, ours), (_, kept) in zip(
            saved[True].tensors(kind), saved[False].tensors(kind), strict=True
        ):
            assert torch.equal(ours, kept), (kind, name)
    for is_split in (True, False):
        engine = new_engine(cpu, grid, is_split, None, **parallel)
        engine.restore(saved[not is_split])
        if is_split:  # the masters, and not the rounded weights, were restored
            assert any(part.any() for part in engine.optimizer.chained_optimizers[0].optimizer.remainders)
        assert steps(engine, HALF, STEPS) == curves[True][HALF:]


LAYOUTS = {
    "distributed, overlapped": DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "replicated": MEGATRON,
    "tp2 sp": MEGATRON | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": MEGATRON | {"pipeline_model_parallel_size": 2},
}
"""Layouts of two ranks."""


@pytest.mark.slow
def test_every_layout_equals_kept_masters(tmp_path):
    """Also a checkpoint that goes on in another layout, with kept masters and without."""
    at = str(tmp_path / "ckpt")
    cases = {}
    for name, parallel in LAYOUTS.items():
        cases[name] = {
            "changes": {"parallel": parallel, "optim": {"bf16": True}},
            "break": "rounded half away",
        }
        cases[f"{name}: split"] = {"changes": {"parallel": parallel, "optim": SPLIT}}
    cases["first"] = cases["tp2 sp: split"] | {"last": HALF, "save": at}
    for name in ("distributed, overlapped", "distributed, overlapped: split"):
        cases[f"then {name}"] = cases[name] | {"first": HALF, "load": at}
    tied = {"model": {"tie_embeddings": True}}
    for name in ("pp2", "pp2: split"):
        cases[f"tied {name}"] = cases[name] | {"changes": cases[name]["changes"] | tied}
    cases["control"] = {"changes": {"parallel": DISTRIBUTED, "optim": {"bf16": False}}}
    job = {"run": schema.to_dict(RUN), "steps": STEPS, "data_seed": DATA_SEED, "cases": cases}
    curves = launch.ranks(2, "engine_worker.py", job, tmp_path)
    for name in (*LAYOUTS, "then distributed, overlapped", "tied pp2"):
        assert curves[f"{name}: split"] == curves[name], name
    assert curves["control"] != curves["distributed, overlapped"]


def test_what_cannot_split_masters_is_refused():
    base = "--model internlm-tiny --data-path x --store-param-remainders"
    for words, text in (
        ("", "add --bf16"),
        ("--bf16 --deepspeed --zero-stage 1", "leave out --deepspeed"),
        ("--bf16 --optimizer muon", "does not go with --optimizer muon"),
        ("--bf16 --ema-decay 0.9", "leave out --ema-decay 0.9"),
    ):
        with pytest.raises(UserError, match=text):
            resolve([*base.split(), *words.split()], 1)
    assert resolve([*base.split(), "--bf16"], 1)[0].optim.store_param_remainders
