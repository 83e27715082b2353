"""Products and attention of bf16 and fp16 numbers in fp32: values, gradients, memory, and their choice."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.engines import MODEL, run_cases, worst
from helpers.layouts import SP, TP
from helpers.moe import MIXTRAL
from safetensors.torch import save_file
from torch.nn import functional as F

from ascendspeed.config.schema import LoraConfig
from ascendspeed.distributed import fp32_products, fused_kernels
from ascendspeed.distributed.cpu_products import Products
from ascendspeed.distributed.device import Device
from ascendspeed.models.lora import targets
from ascendspeed.models.lora.adapter import initial_tensors
from ascendspeed.models.param_mapping import random_tensors

CPU = Device("cpu", 0, "gloo", "a CPU")
TRAINING = Products("auto", "bf16", 2752, 512, 1024)
INFERENCE = Products("auto", "bf16", 4096, 1024)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = [(4, 48, 40), (7, 1, 5), (31, 100, 17), (64, 125, 96)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def small_parts(monkeypatch):
    """A weight is converted some rows at a time."""
    monkeypatch.setattr(fp32_products, "PART_ELEMENTS", 700)


def operands(rows: int, outputs: int, inputs: int, strides: str, dtype: torch.dtype):
    """x [rows, inputs] and weight [outputs, inputs]."""
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, seed=1, dtype=dtype)
    if strides == "transposed":
        return x.t().contiguous().t(), weight.t().contiguous().t()
    if strides == "parts":
        wide, tall = random(rows, 3 * inputs, dtype=dtype), random(2 * outputs, inputs, seed=1, dtype=dtype)
        return wide[:, inputs : 2 * inputs], tall[::2]
    return x, weight


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Largest error of fp64 numbers rounded to `dtype` after sums in fp32."""
    return exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "parts"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_exact_to_the_last_bit(small_parts, sizes, dtype, strides):
    """Against fp64, each within half of the last bit. Control: one input left out."""
    x, weight = operands(*sizes, strides, TYPES[dtype])
    exact = x.double() @ weight.double().t()
    actual = fp32_products.linear(x, weight)
    assert actual.dtype == x.dtype
    assert bool(((actual.double() - exact).abs() <= rounding(exact, x.dtype)).all())
    wrong = fp32_products.linear(x[:, 1:], weight[:, 1:])
    assert not bool(((wrong.double() - exact).abs() <= rounding(exact, x.dtype)).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_exact_to_the_last_bit(cpu, small_parts, sizes, dtype):
    """x [s, b, k] against fp64. Control: the weight's gradient of other rows."""
    from ascendspeed.models.gpt.linear import differentiable

    x, weight = operands(*sizes, "contiguous", TYPES[dtype])
    gradient = random(sizes[0], 1, sizes[1], seed=2, dtype=x.dtype)

    def gradients(function, precision):
        leaves = [
            tensor.to(precision).detach().requires_grad_() for tensor in (x.view(-1, 1, sizes[2]), weight)
        ]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(precision))]

    exact = gradients(F.linear, torch.float64)
    actual = gradients(lambda x, w: differentiable(x, w, fp32_products.linear), x.dtype)
    for tensor, right in zip(actual, exact, strict=True):
        assert tensor.shape == right.shape
        assert bool(((tensor.double() - right).abs() <= rounding(right, x.dtype)).all())
    if sizes[1] > 1:
        wrong = actual[2].flip(0).double()
        assert not bool(((wrong - exact[2]).abs() <= rounding(exact[2], x.dtype)).all())


def test_few_rows_are_torchs_and_no_rows_are_none(monkeypatch):
    weight = random(24, 16, seed=1)
    for rows in range(fp32_products.MIN_ROWS):
        x = random(rows, 16)
        assert torch.equal(fp32_products.linear(x, weight), F.linear(x, weight))
    assert torch.equal(fp32_products.linear(random(16), weight), F.linear(random(16), weight))
    assert fp32_products.linear(torch.zeros(0, 3, 16, dtype=torch.bfloat16), weight).shape == (0, 3, 24)
    nothing = torch.zeros(8, 0, dtype=torch.bfloat16)
    assert torch.equal(fp32_products.linear(nothing, nothing[:5]), torch.zeros(8, 5, dtype=torch.bfloat16))
    monkeypatch.setattr(F, "linear", lambda *_: pytest.fail("torch's"))
    fp32_products.linear(random(fp32_products.MIN_ROWS, 16), weight)


# ---------------------------------------------------------------- attention


@pytest.fixture
def attention(cpu):
    """Makes the attention of a layer with the rotation left out."""
    from helpers.models import ours, tensors_of
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from ascendspeed.config.schema import ParallelConfig, TrainConfig
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.models.gpt import layer_spec
    from ascendspeed.models.gpt.attention import RotaryAttention

    ours(cpu, MODEL, tensors_of(MODEL))  # initialises the process groups

    def make(wide: torch.dtype | None) -> RotaryAttention:
        kernels = Kernels(attention_dtype=wide)
        config = layer_spec.transformer_config(MODEL, ParallelConfig(), TrainConfig(), kernels=kernels)
        groups = ProcessGroupCollection.use_mpu_process_groups(["cp"])
        module = RotaryAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
        module._rotate = lambda query, key, packed: (query, key)
        return module

    return make


def attend(module, operands: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of query, key and value."""
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in operands]
    out = module(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape, seed=9).to(dtype))]


def test_attention_is_computed_in_fp32_and_kept_in_bf16(attention, monkeypatch):
    """The output is that of fp32 attention, rounded, bit by bit; the gradients differ by the rounding of the
    output that autograd keeps. Controls: attention in bf16, gradients of other rows."""
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def recording(pack, unpack):
        return hooks(lambda tensor: kept.append(pack(tensor)) or kept[-1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", recording)
    heads, groups, d = MODEL.num_attention_heads, MODEL.kv_heads, MODEL.head_dim
    operands = [random(96, 2, width, d, seed=seed) for seed, width in enumerate((heads, groups, groups))]
    actual = attend(attention(torch.float32), operands, torch.bfloat16)
    assert [tensor.dtype for tensor in kept if tensor.dim() == 4] == [torch.bfloat16] * 4
    exact = attend(attention(None), operands, torch.float32)
    plain = attend(attention(None), operands, torch.bfloat16)
    assert torch.equal(actual[0], exact[0].bfloat16())
    assert not torch.equal(plain[0], exact[0].bfloat16())
    for ours, right in zip(actual[1:], exact[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        bound = right.abs() * 2**-8 + 4e-3 * float(right.abs().max())
        assert bool(((ours.float() - right).abs() <= bound).all())
        assert not bool(((ours.flip(0).float() - right).abs() <= bound).all())


# ---------------------------------------------------------------- the choice


@pytest.fixture
def without_instructions(monkeypatch):
    monkeypatch.setattr(fp32_products, "has_instructions", lambda dtype: False)


REASON = "in fp32 (without instructions for bf16 on this CPU)"


def test_auto_goes_by_the_cpus_instructions(monkeypatch):
    for supported, expected in ((True, (None, "torch")), (False, (fp32_products.linear, REASON))):
        monkeypatch.setattr(fp32_products, "has_instructions", lambda dtype, answer=supported: answer)
        for products in (TRAINING, INFERENCE):
            assert fp32_products.choose(products, CPU) == expected
            chosen = fp32_products.choose(replace(products, choice="fp32"), CPU)
            assert chosen == (fp32_products.linear, "in fp32")
            assert fp32_products.choose(replace(products, choice="torch"), CPU) == (None, "torch")
            assert fp32_products.choose(products, replace(CPU, kind="other")) == (None, "torch")
            chosen = fp32_products.choose(replace(products, choice="onednn"), CPU)
            assert chosen == (None, "torch (oneDNN is for fp32 on a CPU)")


@pytest.mark.parametrize("dtype", TYPES)
def test_torch_knows_the_instructions(monkeypatch, dtype):
    for answer in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", lambda answer=answer: answer)
        assert fp32_products.has_instructions(dtype) is answer


def test_another_torch_keeps_its_product(monkeypatch):
    class Nothing:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    assert fp32_products.choose(TRAINING, CPU) == (None, "torch")


def test_ranks_choose_alike(monkeypatch, without_instructions):
    """One rank without instructions, and all compute in fp32."""
    monkeypatch.setattr(fp32_products, "has_instructions", lambda dtype: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda flag, op: flag.zero_())
    assert fp32_products.choose(TRAINING, CPU) == (fp32_products.linear, REASON)


def test_kernels_name_the_product(without_instructions):
    chosen = fused_kernels.select_kernels(CPU, products=TRAINING, rms_norm=False)
    assert (chosen.linear, chosen.attention_dtype) == (fp32_products.linear, torch.float32)
    assert str(chosen) == f"rms_norm: torch; linear, attention: {REASON}"
    chosen = fused_kernels.select_kernels(CPU, products=INFERENCE, rms_norm=False)
    assert (chosen.linear, chosen.attention_dtype, chosen.pack_weight) == (fp32_products.linear, None, None)
    assert str(chosen) == f"rms_norm: torch; linear: {REASON}"
    chosen = fused_kernels.select_kernels(CPU, products=replace(TRAINING, dtype="fp32", choice="fp32"))
    assert (chosen.linear, chosen.attention_dtype) == (fused_kernels.linear, None)


def test_the_log_of_a_run_names_both(without_instructions):
    from ascendspeed.config.schema import DataConfig, OptimConfig, ParallelConfig, Run, TrainConfig
    from ascendspeed.training import kernel_choice

    run = Run(MODEL, ParallelConfig(), OptimConfig(bf16=True), DataConfig(), TrainConfig())
    text = str(kernel_choice.select(run, CPU))
    assert f"linear: {REASON}" in text
    assert f"attention: torch SDPA {REASON}" in text


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "names",
    [
        ("TP, SP",),
        pytest.param(("ZeRO-3", "TP, adapters", "Megatron, experts", "dropout"), marks=pytest.mark.slow),
    ],
)
def test_training_on_two_ranks(names, tmp_path):
    """Curves of torch's products in bf16, within the rounding of bf16; a resumed run has equal bits.

    Control: gradients of weights with their rows in another order.
    """
    bf16 = {"optim": {"bf16": True}}
    lora = targets.resolve_config(MODEL, LoraConfig(lora_rank=4))
    fresh = [*random_tensors(MODEL, 1), *initial_tensors(MODEL, lora, 1)]
    save_file(dict(fresh), tmp_path / "adapters.safetensors")
    layouts = {
        "ZeRO-3": {
            "parallel": {"zero_stage": 3, "tensor_model_parallel_size": 1},
            "train": {"recompute_granularity": "full"},
        },
        "TP, SP": {"parallel": TP | SP | {"zero_stage": 1}},
        "TP, adapters": {"parallel": TP | {"zero_stage": 1}, "lora": vars(lora)},
        "Megatron, experts": {"parallel": {"deepspeed": False} | TP | SP, "model": vars(MIXTRAL)},
        "dropout": {"parallel": TP | {"zero_stage": 1}, "train": {"attention_dropout": 0.1}},
    }
    cases, layouts = {}, {name: layouts[name] for name in names}
    for name, layout in layouts.items():
        weights = {"weights": str(tmp_path / "adapters.safetensors")} if "lora" in layout else {}
        cases[name] = {"last": 3, "changes": layout | bf16, **weights}
        cases[f"{name}, fp32"] = {**cases[name], "in_fp32": True}
    first = next(iter(layouts))
    saved = {**cases[f"{first}, fp32"], "last": 2, "save": str(tmp_path / "saved")}
    cases["saved"] = saved
    cases["resumed"] = {**cases[f"{first}, fp32"], "first": 2, "load": saved["save"]}
    cases["wrong"] = {**cases[f"{first}, fp32"], "break": "rows of weight gradients"}
    curves = run_cases("tp2-dp1", cases, tmp_path, micro_batch_size=2)
    assert curves["saved"] + curves["resumed"] == curves[f"{first}, fp32"]  # bit by bit
    for name in layouts:
        loss, norm = worst(curves[f"{name}, fp32"], curves[name])
        assert 0 < loss < (3e-3 if name == "Megatron, experts" else 5e-4), name  # a router may choose another
        assert norm < 5e-3, name
        assert curves[f"{name}, fp32: products"][0][0] >= 3 * 3 * 2 * 4
    assert worst(curves["wrong"], curves[first])[0] > 3e-3
