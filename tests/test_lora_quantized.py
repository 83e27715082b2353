"""LoRA over a quantized base against peft over the dequantized one: losses, gradients, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import worst
from helpers.lora import ALL, BIASES, PP, SP, TP, Setting, biases, run, zero

from ascendspeed.cli.train_args import resolve
from ascendspeed.models import int8, nf4
from ascendspeed.utils.errors import UserError


def quantized(base: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """The base with the linears of the layers in int8 or NF4 and back."""
    is_linear = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")

    def there_and_back(weight: torch.Tensor) -> torch.Tensor:
        if bits == 4:
            return nf4.dequantize(*nf4.quantize(weight), torch.float32)
        return int8.dequantize(*int8.quantize(weight, torch.float32))

    return {n: there_and_back(tensor) if n.endswith(is_linear) else tensor for n, tensor in base.items()}


def check_quantized(
    setting: Setting, layouts: dict[str, dict[str, Any]], bits: int, world: int, folder: Path
) -> None:
    """Losses of peft over the base that is quantised and back; the plain base is the control."""
    cases = {
        name: setting.case(parallel, lora={"quantization_bit": bits}) for name, parallel in layouts.items()
    }
    base, setting.base = setting.base, quantized(setting.base, bits)
    expected = setting.expected()
    setting.base = base
    plain = setting.expected()
    for name, curve in run(world, cases, folder).items():
        loss, norm = worst(curve, expected)
        print(name, loss, norm)
        assert (loss < 1e-5, norm < 1e-4) == (True, True), (name, loss, norm)
        assert worst(curve, plain)[0] > 1e-5, name  # control


QUANTIZED_ALONE = {"megatron": {}, "zero 1": zero(1), "zero 0": zero(0)}
QUANTIZED_ON_TWO = {"tp 2 sp": TP | SP, "zero 2": zero(2), "pp 2": PP, "tp 2": zero(1) | TP}


@pytest.mark.slow
def test_an_int8_base_equals_peft_on_the_same_base(biases, tmp_path):
    check_quantized(biases, QUANTIZED_ALONE, 8, 1, tmp_path / "one")
    check_quantized(biases, QUANTIZED_ON_TWO, 8, 2, tmp_path / "two")


@pytest.mark.slow
def test_an_nf4_base_equals_peft_on_the_same_base(tmp_path):
    wide = Setting(replace(BIASES, hidden_size=128, ffn_hidden_size=256), ALL, tmp_path / "wide")
    check_quantized(wide, QUANTIZED_ALONE, 4, 1, tmp_path / "one")
    check_quantized(wide, QUANTIZED_ON_TWO, 4, 2, tmp_path / "two")


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_of_a_quantised_linear(cpu, bits):
    """Against torch's product with the dequantised weight."""
    from ascendspeed.distributed import fused_kernels
    from ascendspeed.models import quantized_weight
    from ascendspeed.models.gpt.linear import KernelLinear

    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(6, 128, generator=generator), torch.randn(3, 2, 128, generator=generator)
    numbers, scale = nf4.quantize(weight) if bits == 4 else int8.quantize(weight, torch.float32)
    x.requires_grad_()
    out = KernelLinear.apply(x, numbers, None, fused_kernels.linear, False, False, None, scale)
    plain = quantized_weight.dequantize(numbers, scale, torch.float32)
    assert torch.equal(out, x @ plain.t())
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad((x @ plain.t()).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)
    (other,) = torch.autograd.grad((x @ weight.t()).square().sum(), x)
    assert (gradient - other).abs().max() > 1e-3  # control


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--quantization-bit 8", "--quantization-bit without --lora-rank has no effect"),
        ("--quantization-bit 8 --lora-rank 4 --deepspeed --zero-stage 3", "use stage 0, 1 or 2"),
        (
            "--quantization-bit 4 --lora-rank 4 --ffn-hidden-size 96 --model internlm-tiny",
            "an MLP of 96 has 96",
        ),
    ],
)
def test_a_quantised_base_that_cannot_be(words, message):
    with pytest.raises(UserError, match=message):
        resolve(["--data-path", "x", *words.split()], 1)
