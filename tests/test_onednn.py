"""Products of oneDNN against torch's: values, gradients, packed weights, and the choice between the two."""

import weakref
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from helpers import launch
from helpers.engines import MODEL, run_cases, worst
from helpers.generate_worker import run_case
from helpers.generation import language_model, token_lists
from helpers.layouts import SP, TP
from helpers.models import INTERNLM, ours, tensors_of, tokens_of
from helpers.moe import MIXTRAL
from safetensors.torch import save_file
from torch.nn import functional as F

from ascendspeed.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    TrainConfig,
)
from ascendspeed.distributed import fused_kernels, onednn
from ascendspeed.distributed.cpu_products import Products
from ascendspeed.distributed.device import Device
from ascendspeed.models.lora import targets
from ascendspeed.models.lora.adapter import initial_tensors
from ascendspeed.models.param_mapping import random_tensors

CPU = Device("cpu", 0, "gloo", "a CPU")
TRAINING = Products("auto", "fp32", 2752, 512, 1024)
INFERENCE = Products("auto", "fp32", 4096, 1024)
SIZES = [(1, 48, 40), (2, 33, 64), (7, 1, 5), (31, 100, 17), (64, 125, 96)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def any_size(monkeypatch):
    """oneDNN takes products of every size, and packs weights of every size."""
    monkeypatch.setattr(onednn, "MIN_SIZE", 1)
    monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(onednn, "MIN_PACKED_ELEMENTS", 1)


def operands(rows: int, outputs: int, inputs: int, strides: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, inputs] and weight [outputs, inputs] in fp32."""
    x, weight = random(rows, inputs), random(outputs, inputs, seed=1)
    if strides == "transposed":
        return x.t().contiguous().t(), weight.t().contiguous().t()
    if strides == "parts":
        return random(rows, 3 * inputs)[:, inputs : 2 * inputs], random(2 * outputs, inputs, seed=1)[::2]
    return x, weight


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).abs().max())


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "parts"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_as_exact_as_torchs(any_size, sizes, strides):
    """Plain and packed weights against fp64: within twice torch's own error. Control: one input left out."""
    x, weight = operands(*sizes, strides)
    exact = x.double() @ weight.double().t()
    bound = 2 * error(F.linear(x, weight), exact) + 4e-7 * float(exact.abs().max())
    for w in (weight, onednn.pack(weight)):
        assert error(onednn.linear(x, w), exact) <= bound
    assert error(onednn.linear(x[:, 1:], weight[:, 1:]), exact) > bound


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "parts"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_as_exact_as_autograds(cpu, any_size, sizes, bias, strides):
    """x [s, b, k] against fp64. Control: the weight's gradient of other rows."""
    from ascendspeed.models.gpt.linear import KernelLinear

    x, weight = operands(*sizes, strides)
    x, offset, gradient = x.view(-1, 1, sizes[2]), random(sizes[1], seed=2), random(sizes[0], 1, sizes[1])
    inputs = [x, weight, offset][: 2 + bias]

    def gradients(function, dtype=torch.float32) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    exact, torchs = gradients(F.linear, torch.float64), gradients(F.linear)
    actual = gradients(lambda x, w, b=None: KernelLinear.apply(x, w, b, onednn.linear, False, False, None))
    bounds = [
        2 * error(theirs, right) + 4e-7 * float(right.abs().max())
        for theirs, right in zip(torchs, exact, strict=True)
    ]
    assert [tensor.shape for tensor in actual] == [tensor.shape for tensor in exact]
    for tensor, right, bound in zip(actual, exact, bounds, strict=True):
        assert error(tensor, right) <= bound
    if sizes[1] > 1:
        assert error(actual[2].flip(0), exact[2]) > bounds[2]


def test_no_rows_and_one_row(cpu, any_size):
    from ascendspeed.models.gpt.linear import KernelLinear

    weight = random(24, 16).requires_grad_()
    empty = torch.zeros(0, 3, 16, requires_grad=True)
    out = KernelLinear.apply(empty, weight, None, onednn.linear, False, False, None)
    assert out.shape == (0, 3, 24)
    out.sum().backward()
    assert empty.grad.shape == empty.shape
    assert torch.equal(weight.grad, torch.zeros(24, 16))
    packed = onednn.pack(weight.detach())
    assert onednn.linear(empty.detach(), packed).shape == (0, 3, 24)
    torch.testing.assert_close(onednn.linear(random(16), packed), F.linear(random(16), weight.detach()))


def test_a_frozen_weight_keeps_no_input(cpu, any_size):
    from ascendspeed.models.gpt.linear import KernelLinear

    weight, x = random(24, 16), random(40, 1, 16).requires_grad_()
    out = KernelLinear.apply(x * 1, weight, None, onednn.linear, False, False, None)
    assert out.grad_fn.saved_tensors[0] is None
    out.backward(random(40, 1, 24, seed=3))
    torch.testing.assert_close(x.grad[:, 0], random(40, 1, 24, seed=3)[:, 0] @ weight)


def test_small_products_and_other_formats_are_torchs(monkeypatch):
    """By the sizes alone, alike for a product and its gradients."""
    monkeypatch.setattr(onednn, "_multiply", lambda x, weight: "oneDNN's")
    rows, outputs, inputs = 64, 512, 256
    x, weight, gradient = random(rows, inputs), random(outputs, inputs, seed=1), random(rows, outputs)
    products = [(x, weight), (gradient, weight.t()), (gradient.t(), x.t())]
    assert [onednn.linear(*pair) for pair in products] == ["oneDNN's"] * 3
    for pair in [(x[:63], weight), (gradient[:63], weight.t()), (gradient[:63].t(), x[:63].t())]:
        assert torch.equal(onednn.linear(*pair), F.linear(*pair))
    for narrow in (x[:1], x[:31].repeat(1, 1)):
        assert torch.equal(onednn.linear(narrow, weight), F.linear(narrow, weight))
    pair = (x.bfloat16(), weight.bfloat16())
    assert torch.equal(onednn.linear(*pair), F.linear(*pair))
    assert onednn.pack(pair[1]) is pair[1]
    assert onednn.pack(x) is x  # too small


def test_a_packed_weight_is_the_same_weight_and_is_never_read_as_another(any_size):
    weight = random(33, 48)
    packed = onednn.pack(weight)
    assert (packed.shape, packed.dtype, packed.numel()) == (weight.shape, weight.dtype, weight.numel())
    assert torch.equal(packed.to_dense(), weight)
    for read in (lambda: F.linear(random(2, 48), packed), packed.sum, lambda: packed[0], packed.data_ptr):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read()


# ---------------------------------------------------------------- the choice


@pytest.fixture
def machine(monkeypatch):
    """Sets maker and units of the CPU, and the measured gain."""

    def become(maker: str = "AuthenticAMD", flags: str = "avx2 avx512f", gain: float = 1.8) -> None:
        monkeypatch.setattr(onednn, "cpu_info", lambda: {"vendor_id": maker, "flags": flags})
        monkeypatch.setattr(onednn, "measured_gain", lambda products: gain)

    become()
    return become


FASTER = "oneDNN (1.8 times as fast as torch on this CPU)"


def test_auto_takes_what_is_faster(machine):
    for products in (TRAINING, INFERENCE):
        assert onednn.choose(products, CPU) == (onednn.linear, FASTER)
        gain = 1.19 if products.rows else 1.04
        machine(gain=gain)
        assert onednn.choose(products, CPU) == (None, f"torch (oneDNN is {gain} times as fast on this CPU)")
        machine("GenuineIntel")
        reason = "torch (MKL is expected to be fast on this CPU, GenuineIntel)"
        assert onednn.choose(products, CPU) == (None, reason)
        machine()
    machine(flags="avx2")
    reason = "torch (oneDNN gains nothing in training on this CPU, which has no AVX-512)"
    assert onednn.choose(TRAINING, CPU) == (None, reason)
    packed = (onednn.linear_of_packed, f"{FASTER}, for packed weights")
    assert onednn.choose(INFERENCE, CPU) == packed
    assert onednn.choose(replace(INFERENCE, choice="onednn"), CPU) == (onednn.linear, "oneDNN")


def test_auto_measures_only_matrices_that_can_gain(machine, monkeypatch):
    monkeypatch.setattr(onednn, "measured_gain", lambda products: pytest.fail("measured"))
    for products in (replace(TRAINING, rows=31), Products("auto", "fp32", 704, 256)):
        reason = "torch (oneDNN gains nothing with small matrices)"
        assert onednn.choose(products, CPU) == (None, reason)
    assert onednn.choose(replace(TRAINING, choice="onednn"), CPU) == (onednn.linear, "oneDNN")


def test_never_for_another_format_or_device(machine, monkeypatch):
    monkeypatch.setattr(onednn, "_obstacle", lambda products: pytest.fail("looked"))
    for choice, text in (("auto", "torch"), ("onednn", "torch (oneDNN is for fp32 on a CPU)")):
        for dtype in ("bf16", "fp16"):
            assert onednn.choose(replace(TRAINING, choice=choice, dtype=dtype), CPU) == (None, text)
        other = replace(CPU, kind="other")
        assert onednn.choose(replace(INFERENCE, choice=choice), other) == (None, text)
    assert onednn.choose(replace(TRAINING, choice="torch"), CPU) == (None, "torch")


@pytest.mark.parametrize("choice", ["auto", "onednn"])
def test_an_operation_that_is_not_the_tested_one_is_not_used(machine, monkeypatch, choice):
    products = replace(TRAINING, choice=choice)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.14.0+cpu")
        reason = "torch (oneDNN was not tested with torch 2.14.0+cpu)"
        assert onednn.choose(products, CPU) == (None, reason)
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "_multiply", lambda x, weight: x @ weight.to_dense().t() + 1)
        assert onednn.choose(products, CPU) == (None, "torch (oneDNN's product is not torch's)")

    def missing(x, weight):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'\nmore")

    monkeypatch.setattr(onednn, "_multiply", missing)
    used, source = onednn.choose(products, CPU)
    assert used is None
    assert source.startswith("torch (oneDNN: '_OpNamespace' 'mkldnn' object")
    assert "\n" not in source


def test_ranks_choose_alike(machine, monkeypatch):
    """One rank that cannot, and all use torch."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(onednn, "measured_gain", lambda products: pytest.fail("rank 0 measures"))
    monkeypatch.setattr(dist, "all_reduce", lambda flag, op: flag.zero_())
    reason = "torch (oneDNN cannot be used on the machine of another rank)"
    assert onednn.choose(TRAINING, CPU) == (None, reason)
    monkeypatch.setattr(dist, "all_reduce", lambda flag, op: None)
    assert onednn.choose(TRAINING, CPU) == (onednn.linear, "oneDNN")


def test_plain_weights_can_stay_torchs(any_size):
    x, weight = random(40, 64), random(48, 64, seed=1)
    assert torch.equal(onednn.linear_of_packed(x, weight), F.linear(x, weight))
    packed = onednn.pack(weight)
    assert torch.equal(onednn.linear_of_packed(x, packed), onednn.linear(x, packed))


def test_the_measurement_runs(any_size):
    for products in (TRAINING, INFERENCE):
        assert onednn.measured_gain(replace(products, outputs=64, inputs=64)) > 0


def test_kernels_name_the_product(machine):
    chosen = fused_kernels.select_kernels(CPU, products=TRAINING, rms_norm=False)
    assert (chosen.linear, str(chosen)) == (onednn.linear, f"rms_norm: torch; linear: {FASTER}")
    chosen = fused_kernels.select_kernels(CPU, products=replace(TRAINING, choice="torch"), rms_norm=False)
    assert (chosen.linear, chosen.pack_weight) == (fused_kernels.linear, None)
    assert str(chosen) == "rms_norm, linear: torch"


def test_torchs_product_stays_megatrons_function(cpu, monkeypatch):
    """Also after DeepSpeed has replaced F.linear, at ZeRO stage 3."""
    from ascendspeed.models.gpt.linear import KernelLinear

    before = F.linear
    monkeypatch.setattr(F, "linear", lambda *operands: before(*operands))
    monkeypatch.setattr(KernelLinear, "apply", lambda *_: pytest.fail("not Megatron's function"))
    model = ours(cpu, INTERNLM, tensors_of(INTERNLM))
    model(tokens_of(INTERNLM), None, None).sum().backward()


def test_products_of_a_run():
    model = ModelConfig(hidden_size=64, ffn_hidden_size=96)
    parallel, train = ParallelConfig(tensor_model_parallel_size=2), TrainConfig(micro_batch_size=3)
    run = Run(model, parallel, OptimConfig(), DataConfig(), train)
    assert Products.of_training(run) == Products("auto", "fp32", 96, 64, 3 * 2048)
    assert Products.of_inference("torch", "bf16", model, run.parallel) == Products("torch", "bf16", 96, 64)


# ---------------------------------------------------------------- generation


def packed_model(cpu, model: ModelConfig, tensors):
    from ascendspeed.distributed import process_groups
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.inference.engine import LanguageModel
    from ascendspeed.models.gpt import gpt_model, layer_spec

    layout = ParallelConfig()
    kernels = Kernels(linear=onednn.linear, pack_weight=onednn.pack)
    settings = layer_spec.transformer_config(model, layout, TrainConfig(), kernels=kernels)
    gpt = gpt_model.build_model(model, layout, settings)
    gpt_model.load_weights(gpt, model, layout, tensors.items())
    return LanguageModel(gpt, model, process_groups.initialize(cpu, layout, 1), cpu)


VARIANTS = {
    "biases": INTERNLM,
    "normalized head": replace(INTERNLM, normalize_head=True),
    "tied": replace(INTERNLM, tie_embeddings=True),
    "tied, normalized": replace(INTERNLM, tie_embeddings=True, normalize_head=True),
    "experts": MIXTRAL,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_with_packed_weights(cpu, any_size, name):
    """Several rows, one row and several again: the tokens and log-probabilities of plain weights."""
    from ascendspeed.inference.engine import SamplingParams, sample, token_logprobs
    from ascendspeed.models.gpt.linear import ColumnLinear, RowLinear

    model = VARIANTS[name]
    tensors = tensors_of(model)
    rows, params = tokens_of(model, 9).tolist(), SamplingParams(max_new_tokens=6)
    plain, packed = language_model(cpu, model, tensors), packed_model(cpu, model, tensors)
    before = {key: value.clone() for key, value in packed.gpt.state_dict().items() if value is not None}
    head = packed.gpt.output_layer
    for prompts in (rows, rows[:1], rows):
        expected, actual = (sample(side, prompts, params) for side in (plain, packed))
        assert token_lists(actual) == token_lists(expected)
        are_packed = {
            module.weight.is_mkldnn
            for module in packed.gpt.modules()
            if isinstance(module, ColumnLinear | RowLinear) and module.weight is not None
        }
        assert are_packed == {len(prompts) > 1}
        assert not packed.gpt.embedding.word_embeddings.weight.is_mkldnn
        if not model.tie_embeddings:
            assert head.weight.is_mkldnn == (len(prompts) > 1)
    for actual, expected in zip(token_logprobs(packed, rows), token_logprobs(plain, rows), strict=True):
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=0, atol=2e-5)
    packed.allocate_cache(1, 4, [4])
    after = {key: value for key, value in packed.gpt.state_dict().items() if value is not None}
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_weight_exists_once(cpu, any_size):
    model = packed_model(cpu, INTERNLM, tensors_of(INTERNLM))
    linear = model.gpt.decoder.layers[0].mlp.linear_fc1
    plain = weakref.ref(linear.weight)
    model.allocate_cache(2, 4, [4])
    assert plain() is None
    packed = weakref.ref(linear.weight)
    model.allocate_cache(1, 4, [4])
    assert packed() is None


def test_generation_with_packed_weights_on_two_ranks(cpu, tmp_path):
    """Tensor parallel, and pipeline parallel with an embedding tied across stages."""
    cases, expected = {}, {}
    for name, layouts in (("biases", [(2, 1)]), ("tied, normalized", [(1, 2)])):
        model, tensors = VARIANTS[name], tensors_of(VARIANTS[name])
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{name}.safetensors")
        rows = tokens_of(model, 7).tolist()
        requests = [[row[:4], row[4:]] for row in rows]
        asks = {"prompts": rows, "params": {"greedy": {"max_new_tokens": 5}}, "requests": requests}
        expected[name] = run_case(language_model(cpu, model, tensors), asks)
        for tp, pp in layouts:
            case = {"model": asdict(model), "weights": str(tmp_path / f"{name}.safetensors"), **asks}
            cases[f"{name}: {tp} x {pp}"] = {**case, "tp": tp, "pp": pp, "packed": True}
    results = launch.ranks(2, "generate_worker.py", {"cases": cases}, tmp_path / "run")
    assert results.keys() == cases.keys()
    for case, answer in results.items():
        alone = expected[case.partition(":")[0]]
        for actual, right in zip(answer["texts"]["greedy"], alone["texts"]["greedy"], strict=True):
            assert actual[0][:2] == right[0][:2], case
        for actual, right in zip(answer["logprobs"], alone["logprobs"], strict=True):
            assert actual == pytest.approx(right, abs=1e-5), case


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "names",
    [
        ("TP, SP",),
        pytest.param(("ZeRO-3", "TP, SP", "TP, adapters", "Megatron, experts"), marks=pytest.mark.slow),
    ],
)
def test_training_on_two_ranks(names, tmp_path):
    """Tensor and sequence parallel, ZeRO-3, recomputation, adapters and experts; a resumed run.

    Control: gradients of weights with their rows in another order.
    """
    lora = targets.resolve_config(MODEL, LoraConfig(lora_rank=4))
    fresh = [*random_tensors(MODEL, 1), *initial_tensors(MODEL, lora, 1)]
    save_file(dict(fresh), tmp_path / "adapters.safetensors")
    layouts = {
        "ZeRO-3": {
            "parallel": {"zero_stage": 3, "tensor_model_parallel_size": 1},
            "train": {"recompute_granularity": "full"},
        },
        "TP, SP": {"parallel": TP | SP | {"zero_stage": 0}},
        "TP, adapters": {"parallel": TP | {"zero_stage": 1}, "lora": vars(lora)},
        "Megatron, experts": {"parallel": {"deepspeed": False} | TP | SP, "model": vars(MIXTRAL)},
    }
    cases, layouts = {}, {name: layouts[name] for name in names}
    for name, layout in layouts.items():
        weights = {"weights": str(tmp_path / "adapters.safetensors")} if "lora" in layout else {}
        cases[name] = {"last": 3, "changes": layout, **weights}
        cases[f"{name}, oneDNN"] = {**cases[name], "onednn": True}
    cases["wrong"] = {**cases["TP, SP, oneDNN"], "break": "rows of weight gradients"}
    saved = {**cases["TP, SP, oneDNN"], "last": 2, "save": str(tmp_path / "saved")}
    cases["saved"] = saved
    cases["resumed"] = {**cases["TP, SP, oneDNN"], "first": 2, "load": saved["save"]}
    curves = run_cases("tp2-dp1", cases, tmp_path, micro_batch_size=2)
    assert curves["saved"] + curves["resumed"] == curves["TP, SP, oneDNN"]  # bit by bit
    for name in layouts:
        assert max(worst(curves[f"{name}, oneDNN"], curves[name])) < 5e-6, name
        assert curves[f"{name}, oneDNN: products"][0][0] >= 3 * 3 * 2 * 4
    assert max(worst(curves["wrong"], curves["TP, SP"])) > 1e-3
