"""Fused operations against Hugging Face's and fp64: values, gradients, and the choice of the kernel."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from ascendspeed.config.schema import ModelConfig
from ascendspeed.distributed import fused_kernels
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.training_kernels import FusedKernel
from ascendspeed.models.gpt.rope import Rope

S, B, HEADS, D = 7, 3, 2, 8


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rope = Rope(ModelConfig(hidden_size=HEADS * D, num_attention_heads=HEADS))
    return rope.tables(S, dtype, torch.device("cpu"))


def hugging_face_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[s, b, heads, d], by HF's function on [b, heads, s, d]."""
    transposed = x.permute(1, 2, 0, 3)
    turned, _ = apply_rotary_pos_emb(transposed, transposed, cos.view(1, S, D), sin.view(1, S, D))
    return turned.permute(2, 0, 1, 3)


def test_rotary_equals_hugging_face_forward_and_backward():
    cos, sin = tables()
    x, gradient = (
        random(S, B, HEADS, 3 * D)[..., :D].requires_grad_(),
        random(S, B, HEADS, D, seed=1),
    )  # a part of qkv: strided
    expected, actual = hugging_face_rotary(x, cos, sin), fused_kernels.rotary(x, cos, sin)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    back = [torch.autograd.grad(y, x, gradient)[0] for y in (expected, actual)]
    torch.testing.assert_close(back[1], back[0], rtol=0, atol=1e-14)
    assert (back[0] - gradient).abs().max() > 0.5  # the turn is seen
    assert (
        torch.autograd.grad(fused_kernels.rotary(x, cos, -sin), x, gradient)[0] - back[0]
    ).abs().max() > 0.5  # and its direction


def test_rotary_can_be_differentiated_twice():
    x = random(3, 1, 1, D).requires_grad_()
    cos, sin = (table[:3] for table in tables())
    assert torch.autograd.gradgradcheck(lambda x: fused_kernels.rotary(x, cos, sin).square(), (x,))


def test_rms_norm_and_swiglu_equal_their_formulas():
    x, weight = random(S, B, 16).requires_grad_(), random(16, seed=1).requires_grad_()
    actual, gradient = fused_kernels.rms_norm(x, weight, 1e-3), random(S, B, 16, seed=2)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    for actual_gradient, expected_gradient in zip(
        *(torch.autograd.grad(y, (x, weight), gradient) for y in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=0, atol=1e-12)
    assert (fused_kernels.rms_norm(x, weight, 1e-2) - expected).abs().max() > 1e-3  # epsilon counts
    gate, up = x.split(8, -1)
    torch.testing.assert_close(fused_kernels.swiglu(x), gate * torch.sigmoid(gate) * up, rtol=0, atol=1e-14)
    assert (
        fused_kernels.swiglu(torch.cat((up, gate), -1)) - fused_kernels.swiglu(x)
    ).abs().max() > 0.1  # gate first


def test_geglu_equals_hugging_face():
    x = random(S, B, 16).requires_grad_()
    gate, up = x.split(8, -1)
    expected, actual, gradient = (
        ACT2FN["gelu_pytorch_tanh"](gate) * up,
        fused_kernels.geglu(x),
        random(S, B, 8, seed=2),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    back = [torch.autograd.grad(y, x, gradient)[0] for y in (actual, expected)]
    torch.testing.assert_close(back[0], back[1], rtol=0, atol=1e-14)
    assert (ACT2FN["gelu"](gate) * up - actual).abs().max() > 1e-5  # erf's is another function


@pytest.mark.parametrize("operation", ["rotary", "rms_norm"])
def test_bf16_is_no_coarser_than_hugging_face(operation):
    """Root mean square of the error against fp64, on the same rounded inputs."""
    cos, sin = (table.double() for table in tables(torch.bfloat16))
    x, weight = random(S, 64, HEADS, D, dtype=torch.bfloat16), random(D, dtype=torch.bfloat16)
    if operation == "rotary":
        actual, expected = (
            f(x, cos.bfloat16(), sin.bfloat16()) for f in (fused_kernels.rotary, hugging_face_rotary)
        )
        exact = fused_kernels.rotary(x.double(), cos, sin)
    else:
        norm = LlamaRMSNorm(D, 1e-6).bfloat16()
        norm.weight.data.copy_(weight)
        actual, expected, exact = (
            fused_kernels.rms_norm(x, weight, 1e-6),
            norm(x),
            fused_kernels.rms_norm(x.double(), weight.double(), 1e-6),
        )
    errors = [(y.double() - exact).square().mean().sqrt() for y in (actual, expected)]
    assert 0 < errors[0] <= errors[1]


def test_choose_says_what_runs(monkeypatch):
    offered = {"rms_norm": FusedKernel("somebody.rms_norm", lambda x, weight, eps: "theirs")}
    monkeypatch.setattr(fused_kernels, "fused_kernel", lambda device, operation: offered.get(operation))
    chosen = fused_kernels.select_kernels(
        Device("other", 0, "gloo", "a device"), rms_norm=True, rotary=True, swiglu=False
    )
    assert chosen.rms_norm(None, None, 0) == "theirs"
    assert chosen.rotary is fused_kernels.rotary
    assert chosen.swiglu is fused_kernels.swiglu
    assert str(chosen) == (
        "rms_norm: somebody.rms_norm; rotary: torch (no fused kernel is installed for this device); swiglu: "
        "torch"
    )
    chosen = fused_kernels.select_kernels(
        Device("other", 0, "gloo", "a device"), rms_norm=False, rotary=False, swiglu=False
    )
    assert chosen.rms_norm is fused_kernels.rms_norm  # there, but not asked for
