"""Triton kernels in the interpreter against torch in fp64, and compiled for sm_90; neither needs a GPU."""

import pytest
import torch
from helpers import triton_kernels as kernels

from ascendspeed.cli.kernel_checks import check_triton
from ascendspeed.config.schema import TrainConfig
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


def test_rotary_can_be_differentiated_twice(monkeypatch):
    kernels.interpret(monkeypatch)
    x, _, cos, sin = rotary_inputs(torch.float32, 1)
    second = []
    for rotary in (kernels.module("rotary").rotary, fused_kernels.rotary):
        given = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(rotary(given, cos, sin).pow(3).sum(), given, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), given)[0])
    torch.testing.assert_close(second[0], second[1], rtol=1e-4, atol=1e-4)


def test_what_the_7b_launches_compiles_for_sm90(monkeypatch, tmp_path):
    """Launches on tensors without memory: contiguous hidden states, q as a part of qkv."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = kernels.record(monkeypatch)
    for dtype in (torch.bfloat16, torch.float32):
        given = {"device": "meta", "dtype": dtype}
        x = torch.empty(2048, 1, 2 * 11008, **given, requires_grad=True)
        kernels.module("swiglu").swiglu(x).sum().backward()
        q = torch.empty(2048, 1, 32, 3 * 128, **given, requires_grad=True)
        tables = [torch.empty(2048, 1, 1, 128, **given) for _ in range(2)]
        kernels.module("rotary").rotary(q[..., :128], *tables).sum().backward()
    assert len(launches) == 2 * sum(
        len(names) + (name == "rotary") for name, names in kernels.MODULES.items()
    )
    for launch in launches:
        compiled = kernels.compile_for_sm90(launch)
        assert compiled.asm["cubin"]
        assert ".f64" not in compiled.asm["ptx"]
        assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes per thread
        assert "st.global.v4" in compiled.asm["ptx"]
        assert ("cvt.rn.bf16" in compiled.asm["ptx"]) == (launch.arguments[0].dtype == torch.bfloat16)


CUDA = Device("cuda", 0, "nccl", "x")


def test_the_line_of_kernels_names_triton(cpu, monkeypatch):
    monkeypatch.setattr(selection, "_problem", lambda device: "")
    chosen = fused_kernels.select_kernels(CUDA, triton=("auto",), rms_norm=False, rotary=False, swiglu=True)
    assert str(chosen) == "swiglu, rotary: triton; rms_norm: torch"
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
    assert str(chosen) == "rms_norm: torch; rotary, swiglu: torch (no Triton: triton is not installed)"
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
