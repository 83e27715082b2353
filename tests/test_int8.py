"""Int8 weights and int8 KV cache, compared with rounding in plain torch and Hugging Face's model.

Control: the scale of the neighbouring channel or head.
"""

import pytest
import torch
from helpers.generation import hf_generate, hf_logprobs, language_model
from helpers.internlm_versions import MODELS, PROMPTS, hugging_face, rope_of
from helpers.models import tensors_of
from helpers.moe import MODELS as EXPERTS
from helpers.quantization import fake_int8, with_int8_weights
from torch.nn import functional as F

from ascendspeed.inference.engine import SamplingParams, sample, score_continuations, token_logprobs
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.serving.request import Events, RequestParams, Submission
from ascendspeed.models import int8

TEXT = [1, *range(20, 80, 2), 5, 7, 11, *range(90, 20, -3), 61, 60]
SLOW = pytest.mark.slow
GREEDY = SamplingParams(max_new_tokens=12)


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("inputs", [64, 33])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_product_is_that_of_rounded_weights(rows, inputs, dtype, tolerance):
    """33 inputs: torch's int8 kernel would read beyond the rows."""
    generator = torch.Generator().manual_seed(rows)
    weight, x = (
        torch.randn(48, inputs, generator=generator),
        torch.randn(rows, 2, inputs, generator=generator),
    )
    numbers, scale = int8.quantize(weight, torch.float32)
    assert torch.equal(int8.dequantize(numbers, scale), fake_int8(weight))
    x = x[:, :1].to(dtype)
    numbers, scale = int8.quantize(weight, dtype)
    actual = int8.linear(x, numbers, scale, F.linear)

    def error(scale) -> float:
        expected = F.linear(x.double(), numbers.double() * scale.double())
        return float((actual.double() - expected).norm() / expected.norm())

    assert actual.dtype == dtype
    assert error(scale) < tolerance
    assert error(scale.roll(1, 0)) > 10 * tolerance


def test_fp32_never_uses_the_int8_kernel(monkeypatch):
    """It is a scalar loop there; in bf16 up to four rows use it."""
    rows, kernel = [], torch._weight_int8pack_mm
    monkeypatch.setattr(
        torch, "_weight_int8pack_mm", lambda x, *args: rows.append(len(x)) or kernel(x, *args)
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (1, 4, 5):
            int8.linear(
                torch.ones(count, 64, dtype=dtype), *int8.quantize(torch.ones(8, 64), dtype), F.linear
            )
    assert rows == [1, 4]


def test_extreme_rows():
    values = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [1e-40, 0.0]])
    result = int8.dequantize(*int8.quantize(values, torch.float32))
    assert torch.equal(result[0], values[0])
    assert result[1:3].isnan().any(-1).all()  # damaged weights show in the output
    assert result[3].isfinite().all()


def logprobs(model, text=TEXT):
    return token_logprobs(model, [text])[0]


def hf_token_logprobs(reference, text=TEXT):
    return hf_logprobs(reference, text)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ["v3", *(pytest.param(name, marks=SLOW) for name in ("v1", "v2", "v2.5"))])
def test_int8_weights_equal_rounded_ones_of_hugging_face(cpu, name):
    config, tensors = MODELS[name], tensors_of(MODELS[name])
    model = language_model(cpu, config, tensors, quantize="w8a16")
    layer = model.gpt.decoder.layers[0]
    assert layer.mlp.linear_fc1.weight.dtype == layer.self_attention.linear_qkv.weight.dtype == torch.int8
    assert model.gpt.output_layer.weight.dtype == torch.float32

    def distance(shift: int) -> float:
        rounded = with_int8_weights(tensors, shift)
        reference = hugging_face(config, rounded, rope_of(config))
        return float((logprobs(model, TEXT[:60]) - hf_token_logprobs(reference, TEXT[:60])).abs().max())

    assert distance(0) < 1e-5
    assert distance(1) > 1e-2
    plain = language_model(cpu, config, tensors)
    assert float((logprobs(plain) - logprobs(model)).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["qwen2_moe", pytest.param("mixtral", marks=SLOW)])
def test_int8_experts(cpu, name):
    config, tensors = EXPERTS[name], tensors_of(EXPERTS[name])
    actual = logprobs(language_model(cpu, config, tensors, quantize="w8a16"))
    expected = logprobs(language_model(cpu, config, with_int8_weights(tensors)))
    assert float((actual - expected).abs().max()) < 1e-5


def reference_with_int8_cache(config, tensors, monkeypatch, shift: int = 0):
    """Hugging Face's model whose cache returns rounded keys and values."""
    from transformers.cache_utils import DynamicLayer

    def update(layer, keys, values, *args, **kwargs):
        return original(layer, fake_int8(keys, shift), fake_int8(values, shift), *args, **kwargs)

    original = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", update)
    return hugging_face(config, tensors, rope_of(config))


@pytest.mark.parametrize("name", ["v1", pytest.param("v2.5", marks=SLOW)])
def test_the_int8_cache_equals_a_rounded_one_of_hugging_face(cpu, name, monkeypatch):
    config, tensors = MODELS[name], tensors_of(MODELS[name])
    model = language_model(cpu, config, tensors, kv_cache_dtype="int8")
    plain = language_model(cpu, config, tensors)
    assert model.cache_bytes_per_token < 0.4 * plain.cache_bytes_per_token
    expected = logprobs(model, TEXT[:60])
    with monkeypatch.context() as patched:
        reference = reference_with_int8_cache(config, tensors, patched)
        assert float((hf_token_logprobs(reference, TEXT[:60]) - expected).abs().max()) < 1e-5
        texts = [hf_generate(reference, prompt, max_new_tokens=12)[0] for prompt in PROMPTS]
        assert [group[0].tokens for group in sample(model, PROMPTS, GREEDY)] == texts
        assert paged_tokens(model) == texts
        (score,) = score_continuations(model, [(TEXT[:20], TEXT[20:24])])
        logs = hf_token_logprobs(reference, TEXT[:24])[19:]
        assert score.logprob == pytest.approx(float(logs.sum()), abs=1e-5)
    with monkeypatch.context() as patched:
        wrong = reference_with_int8_cache(config, tensors, patched, shift=1)
        assert float((hf_token_logprobs(wrong, TEXT[:60]) - expected).abs().max()) > 1e-2


def paged_tokens(model) -> list[list[int]]:
    engine = PagedEngine(model, EngineSettings(16, 16, token_budget=9))
    submissions = [Submission(i, prompt, RequestParams(GREEDY)) for i, prompt in enumerate(PROMPTS)]
    engine.apply(Events(tuple(submissions)))
    outputs = {}
    while not engine.scheduler.is_idle:
        outputs |= {result.request.id: result.request.output for result in engine.step() if result.reason}
    return [outputs[i] for i in range(len(PROMPTS))]


def test_beams_copy_the_int8_cache_unchanged(cpu):
    config, tensors = MODELS["v2.5"], tensors_of(MODELS["v2.5"])
    model = language_model(cpu, config, tensors, kv_cache_dtype="int8")
    model.allocate_cache(3, 8, [0])
    cached, _ = model.cache.layers[1]
    cached[:2] = torch.randn(2, *cached.numbers.shape[1:])
    before = cached[:]
    model.cache.reorder([1, 1, 0], 5)
    assert torch.equal(cached[:][:, :, :5], before[[1, 1, 0], :, :5])
    model.free_cache()
