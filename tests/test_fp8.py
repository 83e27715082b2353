"""Products in fp8 (--fp8-format): refusals, and by emulation their rounding and where they are used."""

from dataclasses import replace

import pytest
from helpers import engines

from ascendspeed.cli.train_args import resolve
from ascendspeed.distributed import fp8
from ascendspeed.distributed.layer_compiler import LayerCompiler
from ascendspeed.utils.errors import UserError

FLAGS = ["--data-path", "x", "--model", "internlm-tiny", "--bf16", "--compile", "--fp8-format", "hybrid"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bf16", "needs --bf16"),
        ("--compile", "needs --compile"),
        ("--lora-rank 4", "does not go with --lora-rank"),
        ("--ffn-hidden-size 88", "the FFN width must be a multiple of 16, and is 88"),
    ],
)
def test_settings_that_it_lacks(words, message):
    flags = [flag for flag in FLAGS if flag != words]
    if flags == FLAGS:
        flags += words.split()
    with pytest.raises(UserError, match=message):
        resolve(flags, 1)


def test_what_is_missing_is_named(cpu, monkeypatch):
    run, _ = resolve(FLAGS, 1)
    with pytest.raises(UserError, match=r"no products in fp8.*8\.9"):
        fp8.choose(run, cpu)
    monkeypatch.setattr(type(cpu), "has_fp8_products", True)
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs torchao"):
        fp8.choose(run, cpu)
    layers = replace(run, parallel=replace(run.parallel, tensor_model_parallel_size=2))
    with pytest.raises(UserError, match="TP above 1"):
        fp8.choose(layers, cpu)
    assert fp8.choose(engines.RUN, cpu) == (None, "")


def rounded(x, dtype):
    """x rounded to fp8 with one scale, in the type of x."""
    import torch

    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).to(x.dtype) / scale


@pytest.mark.slow
def test_operands_are_rounded_to_fp8():
    """Against products of operands that are rounded by hand; control: the other format of gradients."""
    pytest.importorskip("torchao")
    import torch

    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator) for shape in ((32, 64), (48, 64), (32, 48))
    )
    x.requires_grad_()
    weight.requires_grad_()
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for fp8_format, of_gradient, other in (("hybrid", e5m2, e4m3), ("e4m3", e4m3, e5m2)):
        out = fp8.product(fp8_format, emulate=True)(x, weight)
        actual = [out.detach(), *torch.autograd.grad(out, (x, weight), gradient)]

        def expected(kind):
            near, w, g = rounded(x.detach(), e4m3), rounded(weight.detach(), e4m3), rounded(gradient, kind)
            return [near @ w.t(), g @ w, g.t() @ near]

        torch.testing.assert_close(actual, expected(of_gradient), rtol=1e-4, atol=1e-4)
        assert (actual[2] - expected(other)[2]).norm() > 1e-3 * actual[2].norm()


@pytest.mark.slow
def test_layers_use_it_and_the_head_does_not(cpu, monkeypatch):
    pytest.importorskip("torchao")
    import torch

    from ascendspeed.config.schema import ParallelConfig, TrainConfig
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    model, layout = replace(engines.MODEL, num_layers=1), ParallelConfig()
    emulated, shapes = fp8.product("hybrid", emulate=True), []

    def product(x, weight):
        shapes.append(tuple(weight.shape))
        return emulated(x, weight)

    tokens = torch.arange(32)[None]
    losses = {}
    for name, call in {"fp32": None, "fp8": product}.items():
        kernels = Kernels(layer_compiler=LayerCompiler("aot_eager"), fp8_product=call)
        config = layer_spec.transformer_config(model, layout, TrainConfig(), "fp32", kernels)
        built = gpt_model.build_model(model, layout, config)
        gpt_model.load_weights(built, model, layout, param_mapping.random_tensors(model, 3))
        losses[name] = built(tokens, tokens, None, labels=tokens.roll(-1, 1))
        losses[name].sum().backward()
        assert all(p.grad is not None for p in built.parameters())
    assert set(shapes) == {(192, 64), (64, 64), (192, 64), (64, 96)}
    difference = (losses["fp8"] - losses["fp32"]).norm() / losses["fp32"].norm()
    assert 1e-4 < difference < 0.1
