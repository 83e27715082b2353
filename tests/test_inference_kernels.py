"""Kernels of inference of CUDA and the NPU: their calls, by functions with the documented arguments, and the
paged cache that they read."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.generation import language_model
from helpers.models import tensors_of
from torch.nn import functional as F

from ascendspeed.distributed import fused_kernels, inference_kernels
from ascendspeed.distributed.inference_kernels import Int8Linear, PagedAttention, PagedBatch, attend
from ascendspeed.inference.engine import SamplingParams, sample
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.serving.request import Events, RequestParams, Submission
from ascendspeed.models import int8
from ascendspeed.models.families import preset

MODEL = replace(
    preset("internlm2-tiny"),
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=101,
)
PROMPTS = [[1, 5, 9, 33, 7], [1, 4], list(range(2, 60)), [*range(2, 60), 7, 8]]
COUNTS, LENGTHS, BLOCKS = [3, 1, 2], [9, 7, 2], [[4, 1, 7], [2, 6], [5]]
"""Queries, keys and blocks of 4 of three sequences."""


def tokens(model) -> dict[int, list[int]]:
    """Tokens of all prompts by the paged engine, with prefixes that are shared and prompts in parts."""
    engine = PagedEngine(model, EngineSettings(60, 8, token_budget=16))
    params = RequestParams(SamplingParams(max_new_tokens=12))
    engine.apply(Events(tuple(Submission(i, prompt, params) for i, prompt in enumerate(PROMPTS))))
    outputs = {}
    while not engine.scheduler.is_idle:
        for result in engine.step():
            outputs[result.request.id] = result.request.output
    return outputs


def test_the_engine_with_a_kernel_gives_the_tokens_of_each_prompt_alone(cpu, monkeypatch):
    monkeypatch.setattr(inference_kernels, "HALF_TYPES", (torch.float32,))
    model = language_model(cpu, MODEL, tensors_of(MODEL))
    params = SamplingParams(max_new_tokens=12)
    expected = {i: sample(model, [prompt], params)[0][0].tokens for i, prompt in enumerate(PROMPTS)}
    plain = model.gpt.config.kernels
    calls = []

    def use(kernel, block_multiple: int = 4) -> None:
        paged = PagedAttention("stand-in", block_multiple, kernel)
        model.gpt.config.kernels = replace(plain, paged=paged)

    use(lambda *args: calls.append(args[3]) or attend(*args))
    assert model.paged_block_size == 32
    assert tokens(model) == expected
    assert {len(batch.ends) for batch in calls} >= {1, 4}  # parts of a prompt, and all sequences
    use(lambda q, k, v, *args: attend(q, k, v.flatten(0, 1).roll(1, 0).view_as(v), *args))  # the control
    assert tokens(model) != expected
    use(None, 256)  # blocks of 8 are no multiple: keys are gathered
    assert model.paged_block_size == 256
    assert tokens(model) == expected


def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, block_table):
    """Arguments of flash_attn 2."""
    assert causal
    assert (max_q, max_k) == (3, 9)
    assert cu_q.dtype == cu_k.dtype == block_table.dtype == torch.int32
    lengths = cu_k.diff().tolist()
    return attend(q, k, v, batch_of(cu_q, lengths, block_table), softmax_scale)


def varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table, num_splits
):
    """Arguments of torch 2.13's varlen_attn."""
    assert cu_k is None
    assert enable_gqa
    assert (max_q, max_k, window_size, num_splits) == (3, 9, (-1, 0), 1)
    return attend(q, k, v, batch_of(cu_q, seqused_k.tolist(), block_table), scale)


def fused_infer(query, key, value, *, scale, num_heads, num_key_value_heads, sparse_mode, **rest):
    """Arguments of npu_fused_infer_attention_score."""
    assert (rest["input_layout"], rest["block_size"], sparse_mode) == ("TND", 4, 3)
    assert (num_heads, num_key_value_heads) == (4, 2)
    assert torch.equal(rest["atten_mask"], torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    k, v = (x.unflatten(2, (num_key_value_heads, -1)) for x in (key, value))
    ends, lengths = rest["actual_seq_lengths"], rest["actual_seq_lengths_kv"]
    return attend(
        query, k, v, SimpleNamespace(ends=ends, key_lengths=lengths, table=rest["block_table"]), scale
    ), None


def batch_of(cumulative, lengths, table):
    return SimpleNamespace(ends=cumulative[1:].tolist(), key_lengths=lengths, table=table)


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (inference_kernels._flash, flash),
        (inference_kernels._torch, varlen),
        (inference_kernels._npu, fused_infer),
    ],
)
def test_arguments_of_the_kernels(call, kernel):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(6, 4, 8, generator=generator)
    keys, values = (torch.randn(8, 4, 2, 8, generator=generator) for _ in range(2))
    batch = PagedBatch.of(COUNTS, LENGTHS, BLOCKS, q.device)
    paged = PagedAttention("stand-in", 1, lambda *args: call(kernel, *args))
    expected = attend(q, keys, values, batch, 8**-0.5)
    assert torch.equal(paged(q, keys, values, batch, None), expected)
    assert not torch.allclose(paged(q, keys, values, batch, 1.0), expected)


def test_a_kernel_whose_first_result_is_wrong_is_not_used(cpu, monkeypatch):
    kernels, chosen = fused_kernels.Kernels(), {}

    def scaled(factor):
        return lambda *args: attend(*args[:4]) * factor

    def fails(*args):
        raise RuntimeError("no block table\nsecond line")

    for name, kernel in {"right": scaled(1), "wrong": scaled(0.9), "fails": fails}.items():
        paged = PagedAttention("stand-in", 1, kernel)
        monkeypatch.setattr(inference_kernels, "_installed_attention", lambda kind, paged=paged: paged)
        chosen[name] = fused_kernels.with_inference_kernels(kernels, cpu, "bf16")
    assert [name for name, kernels in chosen.items() if kernels.paged] == ["right"]
    assert "paged attention: stand-in" in str(chosen["right"])
    assert "torch (stand-in: its result differs from torch's)" in str(chosen["wrong"])
    assert "torch (stand-in: RuntimeError: no block table)" in str(chosen["fails"])
    assert fused_kernels.with_inference_kernels(kernels, cpu, "fp32") == kernels


def test_a_kernel_is_for_half_precision_and_its_block_sizes():
    paged = PagedAttention("stand-in", 128, lambda: None)
    assert paged.supports(torch.bfloat16, 128, 256)
    for dtype, head_dim, block_size in (
        (torch.float32, 128, 256),
        (torch.bfloat16, 12, 256),
        (torch.bfloat16, 264, 256),
        (torch.bfloat16, 128, 64),
    ):
        assert not paged.supports(dtype, head_dim, block_size)


def test_the_devices_product_with_an_int8_weight_comes_first():
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((24, 32), (3, 2, 32)))
    numbers, scale = int8.quantize(weight, torch.float32)

    def kernel(x, weight, scale):
        assert (x.shape, weight.shape, scale.shape) == ((6, 32), (24, 32), (24,))
        return x @ weight.t().to(x.dtype) * scale

    expected = int8.linear(x, numbers, scale, F.linear)
    refused = lambda *_: pytest.fail("the plain product was computed")  # noqa: E731
    assert torch.allclose(int8.linear(x, numbers, scale, refused, kernel), expected, rtol=0, atol=1e-5)


def test_an_int8_product_whose_first_result_is_wrong_is_not_used(cpu, monkeypatch):
    kernels, chosen = fused_kernels.Kernels(), {}
    for factor in (1, 0.9):
        product = Int8Linear("stand-in", lambda x, w, s, factor=factor: (x @ w.t().to(x.dtype) * s) * factor)
        monkeypatch.setattr(inference_kernels, "_installed_int8_linear", lambda kind, own=product: own)
        chosen[factor] = fused_kernels.with_inference_kernels(kernels, cpu, "bf16")
    assert [factor for factor, kernels in chosen.items() if kernels.int8_linear] == [1]
    assert "int8 product: torch (stand-in: its result differs from torch's)" in str(chosen[0.9])


def test_a_kernel_is_used_on_all_ranks_or_on_none(monkeypatch):
    monkeypatch.setattr(inference_kernels.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(inference_kernels.dist, "get_world_size", lambda: 2)
    for other in ("", "it failed"):
        monkeypatch.setattr(
            inference_kernels.dist,
            "all_gather_object",
            lambda found, own, other=other: found.__setitem__(slice(None), [own, other]),
        )
        assert inference_kernels._from_all_ranks("") == other
