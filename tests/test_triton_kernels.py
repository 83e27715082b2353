"""Triton kernels in the interpreter against torch in fp64, and compiled for sm_90; neither needs a GPU."""

import threading
from dataclasses import replace

import pytest
import torch
from helpers import triton_kernels as kernels
from helpers import vocabulary_shards
from torch.nn import functional as F

from ascendspeed.cli.kernel_checks import check_triton
from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.distributed import fused_kernels
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.triton_kernels import selection
from ascendspeed.utils.errors import UserError

pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not tested")

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}
"""Half a unit in the last place just above a power of two; for fp32 the errors of exp and products."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def passes(call, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Value and gradient of a call."""
    x = x.detach().requires_grad_()
    out = call(x)
    return [out.detach(), *torch.autograd.grad(out, x, gradient)]


def compare(call, plain, x: torch.Tensor, gradient: torch.Tensor) -> None:
    """Rounds the exact result once, and is no coarser than plain torch in the same number format."""
    exact = passes(plain, x.double(), gradient.double())
    ours, torchs = passes(call, x, gradient), passes(plain, x, gradient)
    for actual, other, right in zip(ours, torchs, exact, strict=True):
        assert actual.dtype == x.dtype
        assert actual.is_contiguous()
        torch.testing.assert_close(actual.double(), right, rtol=HALF[x.dtype], atol=2e-6)
        errors = [(y.double() - right).norm() for y in (actual, other)]
        assert errors[0] <= errors[1] * (1.01 if x.dtype != torch.float32 else 2)


def swiglu_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [2, 3, 2 · 1030], a part of wider rows, and a gradient [2, 3, 1030] that is no view of rows."""
    width = kernels.module("swiglu").BLOCK + 6
    x, gradient = 3 * random(2, 3, 2 * width + 5).to(dtype), random(3, 2, width, seed=1).to(dtype)
    return x[..., 2 : 2 * width + 2], gradient.transpose(0, 1)


def rotary_inputs(dtype: torch.dtype, rows: int) -> tuple[torch.Tensor, ...]:
    """x [3, 2, 3, 10], a part of qkv, its gradient, and tables of one row or of every row's positions."""
    angles = 6 * random(rows, 3, 1, 5, seed=2).transpose(0, 1).repeat(1, 1, 1, 2)
    x = random(3, 2, 3, 30)[..., 10:20]
    return x.to(dtype), random(3, 2, 3, 10, seed=1).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def with_tables(rotary, tables):
    """Rotary with tables in the number format of x."""
    return lambda x: rotary(x, *(table.to(x.dtype) for table in tables))


@pytest.mark.parametrize("dtype", HALF)
def test_swiglu_and_rotary_equal_torch(dtype, monkeypatch):
    kernels.interpret(monkeypatch)
    compare(kernels.module("swiglu").swiglu, fused_kernels.swiglu, *swiglu_inputs(dtype))
    own, plain = kernels.module("rotary").rotary, fused_kernels.rotary
    for rows in (1, 2):
        x, gradient, *tables = rotary_inputs(dtype, rows)
        compare(with_tables(own, tables), with_tables(plain, tables), x, gradient)
    x = random(3, 2, 3, 10).to(dtype).transpose(-1, -2).contiguous().transpose(-1, -2)
    assert x.stride(-1) == 3
    torch.testing.assert_close(own(x, *tables), own(x.contiguous(), *tables), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("swiglu", "inside, 0.0)", "inside & (column < width - 1), 0.0)"),
        ("rotary", "inside, 0.0)", "inside & (i < half - 1), 0.0)"),
        ("rotary", "row * table_row", "0 * table_row"),
    ],
)
def test_a_wrong_boundary_or_row_is_seen(name, right, wrong, tmp_path, monkeypatch):
    copy = kernels.altered(name, right, wrong, tmp_path)
    kernels.interpret(monkeypatch, copy)
    x, gradient, *tables = (
        swiglu_inputs(torch.float32) if name == "swiglu" else rotary_inputs(torch.float32, 2)
    )
    calls = (with_tables(getattr(owner, name), tables) for owner in (copy, fused_kernels))
    with pytest.raises(AssertionError, match="not close"):
        compare(*calls, x, gradient)


def locked(kernel: fused_kernels.CrossEntropyKernel) -> fused_kernels.CrossEntropyKernel:
    """The kernel for ranks that are threads: the interpreter serves one at a time."""
    lock = threading.Lock()

    def alone(call):
        def run(*arguments):
            with lock:
                return call(*arguments)

        return run

    return fused_kernels.CrossEntropyKernel(alone(kernel.statistics), alone(kernel.write_gradient))


TERMS = ({}, {"label_smoothing": 0.1, "z_coeff": 1e-2, "vocab_size": vocabulary_shards.V})


@pytest.mark.breadth
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("ranks", "terms"), [(1, TERMS[0]), (2, TERMS[1])], ids=str)
def test_cross_entropy_equals_torch(cpu, dtype, ranks, terms, monkeypatch):
    """50 logits and 14 of padding in blocks of 16; labels of other ranks, and one outside the vocabulary."""
    kernels.interpret(monkeypatch)
    monkeypatch.setattr(kernels.module("cross_entropy"), "BLOCK", 16)
    logits, labels, arriving = vocabulary_shards.inputs()
    labels[0, 0], arriving[0, 0] = -100, 0
    least = max(-1e9, torch.finfo(dtype).min)
    padded = torch.cat((logits, torch.full((*logits.shape[:2], 14), least)), -1).to(dtype)
    given = padded, labels, arriving, ranks
    losses, gradient = vocabulary_shards.ours(
        monkeypatch, *given, locked(kernels.module("cross_entropy").cross_entropy), **terms
    )
    expected, torchs = vocabulary_shards.ours(monkeypatch, *given, **terms)
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        gradient, torchs, rtol=HALF[dtype] if dtype != torch.float32 else 1e-5, atol=1e-6
    )
    assert gradient.dtype == dtype
    exact = padded.double().requires_grad_()
    of_exact = loss_of(exact, labels.clamp(min=0), **terms)
    (right,) = torch.autograd.grad(of_exact, exact, arriving.double())
    torch.testing.assert_close(gradient.double(), right, rtol=2 * HALF[dtype] + 1e-5, atol=2e-6)


def loss_of(logits, labels, label_smoothing=0.0, z_coeff=0.0, vocab_size=0):
    """Cross entropy with further terms, in plain torch."""
    flat = logits[..., : vocabulary_shards.V].flatten(0, 1)
    losses = F.cross_entropy(flat, labels.flatten(), reduction="none", label_smoothing=label_smoothing)
    return losses.view_as(labels) + z_coeff * logits.logsumexp(-1).square()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("column < size, -float", "column < size - 1, -float"),
        ("inside = column < size", "inside = column < size - 1"),
        ("column == tl.load", "column + 1 == tl.load"),
        ("row * row_stride", "row * size"),
    ],
)
def test_a_wrong_loss_is_seen(right, wrong, tmp_path, monkeypatch):
    """Logits of wider rows; the largest is the last one."""
    copy = kernels.altered("cross_entropy", right, wrong, tmp_path)
    results = []
    for owner in (kernels.module("cross_entropy"), copy):
        kernels.interpret(monkeypatch, owner)
        monkeypatch.setattr(owner, "BLOCK", 16)
        logits, labels = random(3, 23).float()[:, :21], torch.tensor([0, 20, 7])
        logits[:, 20] += 4
        largest, total, _ = statistics = owner.cross_entropy.statistics(logits, labels)
        ones = torch.ones(3)
        owner.cross_entropy.write_gradient(logits, labels, largest, 1 / total, -ones, None, 0)
        results.append((*statistics, logits))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(*results)


def test_rotary_can_be_differentiated_twice(monkeypatch):
    kernels.interpret(monkeypatch)
    x, _, cos, sin = rotary_inputs(torch.float32, 1)
    second = []
    for rotary in (kernels.module("rotary").rotary, fused_kernels.rotary):
        given = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(rotary(given, cos, sin).pow(3).sum(), given, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), given)[0])
    torch.testing.assert_close(second[0], second[1], rtol=1e-4, atol=1e-4)


def launch_as_7b(dtype: torch.dtype) -> None:
    """Every kernel once per pass on tensors without memory: hidden states, q as a part of qkv, logits."""
    given = {"device": "meta", "dtype": dtype}
    x = torch.empty(2048, 1, 2 * 11008, **given, requires_grad=True)
    kernels.module("swiglu").swiglu(x).sum().backward()
    q = torch.empty(2048, 1, 32, 3 * 128, **given, requires_grad=True)
    tables = [torch.empty(2048, 1, 1, 128, **given) for _ in range(2)]
    kernels.module("rotary").rotary(q[..., :128], *tables).sum().backward()
    logits = torch.empty(2048, 103168, **given)
    labels, column = (torch.empty(2048, device="meta", dtype=t) for t in (torch.int64, torch.float32))
    cross_entropy = kernels.module("cross_entropy").cross_entropy
    cross_entropy.statistics(logits, labels)
    cross_entropy.write_gradient(logits, labels, *[column] * 4, 103168)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_what_the_7b_launches_compiles_for_sm90(dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    statistics_kernel = kernels.module("cross_entropy").statistics_kernel
    launches = kernels.record(monkeypatch)
    launch_as_7b(dtype)
    assert len(launches) == 6
    for launch in launches:
        compiled = kernels.compile_for_sm90(launch)
        assert compiled.asm["cubin"]
        assert ".f64" not in compiled.asm["ptx"]
        assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes per thread
        if launch.function is not statistics_kernel:  # which stores three numbers per row
            assert "st.global.v4" in compiled.asm["ptx"]
            assert ("cvt.rn.bf16" in compiled.asm["ptx"]) == (dtype == torch.bfloat16)


def trained(here, chosen: fused_kernels.Kernels, documents: list[int]) -> list[float]:
    """Losses and gradient norms of two steps of a tiny model in the Megatron engine.

    Adam's epsilon is large: else rounding decides the sign of the update where a gradient is nearly zero.
    """
    from helpers import engines, oracle

    from ascendspeed.data.dataset import Batch
    from ascendspeed.distributed import process_groups
    from ascendspeed.models import param_mapping
    from ascendspeed.training.engines import engine_builder

    run = replace(engines.RUN, parallel=ParallelConfig(), data=replace(engines.RUN.data, seq_length=8))
    run = replace(run, optim=replace(run.optim, adam_eps=0.1))
    run = replace(run, train=replace(run.train, global_batch_size=1, label_smoothing=0.1, z_loss_coeff=1e-2))
    grid = process_groups.initialize(here, run.parallel, 1)
    weights = param_mapping.random_tensors(run.model, 1)
    engine = engine_builder(run, grid, here, chosen)(weights)
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    batches = oracle.batches(run.model.vocab_size, 2, 1, 8, 1)
    results = [engine.step([Batch(**batch, position_ids=positions)], 1e-2) for batch in batches]
    return [number for result in results for number in (result.loss, result.grad_norm)]


@pytest.mark.slow
@pytest.mark.parametrize("documents", [[3, 5], [8]], ids=["packed", "whole"])
def test_a_training_step_equals_the_plain_one(cpu, documents, monkeypatch):
    kernels.interpret(monkeypatch)
    chosen = {name: selection.kernel(name) for name in selection.OPERATIONS}
    ours = trained(cpu, fused_kernels.Kernels(**chosen), documents)
    plain = trained(cpu, fused_kernels.Kernels(), documents)
    assert ours == pytest.approx(plain, rel=1e-6)
    inverse = replace(
        fused_kernels.Kernels(**chosen), rotary=lambda x, cos, sin: chosen["rotary"](x, cos, -sin)
    )
    assert trained(cpu, inverse, documents) != pytest.approx(plain, rel=1e-4)


CUDA = Device("cuda", 0, "nccl", "x")


def test_the_line_of_kernels_names_triton(cpu, monkeypatch):
    monkeypatch.setattr(selection, "_problem", lambda device: "")
    chosen = fused_kernels.select_kernels(CUDA, triton=("auto",), rms_norm=False, rotary=False, swiglu=True)
    assert str(chosen) == "swiglu, rotary, cross_entropy: triton; rms_norm: torch"
    assert chosen.swiglu is kernels.module("swiglu").swiglu
    chosen = fused_kernels.select_kernels(
        CUDA, triton=("rotary",), rms_norm=False, rotary=False, swiglu=False
    )
    assert str(chosen) == "rotary: triton; rms_norm, swiglu: torch"
    for device, choice in ((CUDA, ("off",)), (cpu, ("auto",))):
        chosen = fused_kernels.select_kernels(
            device, triton=choice, rms_norm=False, rotary=False, swiglu=False
        )
        assert chosen == fused_kernels.Kernels()


def test_a_device_without_triton_is_said_or_refused(cpu, monkeypatch):
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: None)
    chosen = fused_kernels.select_kernels(CUDA, triton=("auto",), rms_norm=False, rotary=True, swiglu=False)
    assert (
        str(chosen)
        == "rms_norm: torch; rotary, swiglu, cross_entropy: torch (no Triton: triton is not installed)"
    )
    with pytest.raises(UserError, match="--triton-kernels swiglu: triton is not installed; give auto"):
        selection.select(CUDA, ("swiglu",))
    with pytest.raises(UserError, match="--triton-kernels swiglu rotary: Triton does not compile for a cpu"):
        selection.select(cpu, ("swiglu", "rotary"))


def test_a_first_launch_that_fails_is_said_in_one_line(monkeypatch):
    """As where Triton finds no C compiler."""
    monkeypatch.setattr(selection, "kernel", lambda operation: lambda x: 1 / 0)
    assert "no Triton: " in str(fused_kernels.select_kernels(CUDA, triton=("auto",), swiglu=False))


def test_auto_and_off_stand_alone():
    check_triton(TrainConfig(triton_kernels=("swiglu", "rotary")))
    with pytest.raises(UserError, match="--triton-kernels swiglu off: give off alone, or operations"):
        check_triton(TrainConfig(triton_kernels=("swiglu", "off")))
