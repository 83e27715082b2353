"""Kernels of attention within packed documents: which one is used, and with which arguments."""

import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.packed_attention import GROUPED, flat_attention, positions

from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.distributed import device, training_kernels
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.models import param_mapping


def test_a_kernel_is_used_where_it_can_be(cpu):
    """In bf16, without dropout, when documents lie side by side; it gives what SDPA gives."""
    from ascendspeed.models.gpt import gpt_model, layer_spec
    from ascendspeed.models.gpt.packed_sequences import packed_sequences_of

    calls, layout = [], ParallelConfig()

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: training_kernels.SequenceBounds
    ) -> torch.Tensor:
        calls.append(bounds)
        return flat_attention(q.float(), k.float(), v.float(), bounds.ends).to(q.dtype)

    tensors = dict(param_mapping.random_tensors(GROUPED, 3))
    tokens, ids = torch.randint(0, 125, (2, 24)), positions([5, 19], [24])

    def logits(
        dtype: str, kernels: Kernels, train: TrainConfig | None = None, ids: torch.Tensor = ids
    ) -> torch.Tensor:
        built = gpt_model.build_model(
            GROUPED,
            layout,
            layer_spec.transformer_config(GROUPED, layout, train or TrainConfig(), dtype, kernels),
        )
        gpt_model.load_weights(built, GROUPED, layout, tensors.items())
        with torch.no_grad():
            return built(tokens, ids, None, packed_seq_params=packed_sequences_of(ids))[..., :125].float()

    own, sdpa = logits("bf16", Kernels(varlen=varlen)), logits("bf16", Kernels())
    assert len(calls) == GROUPED.num_layers
    assert all(bounds is calls[0] for bounds in calls)  # made once
    exact = logits("fp32", Kernels(varlen=varlen))
    assert (own - exact).abs().mean() < 1.2 * (sdpa - exact).abs().mean()
    assert (own - exact).abs().mean() < 0.2 * exact.std()
    logits("bf16", Kernels(varlen=varlen), TrainConfig(attention_dropout=0.1))
    logits("bf16", Kernels(varlen=varlen), ids=positions([24], [24]))
    assert len(calls) == GROUPED.num_layers  # by these not


def cuda_kernels() -> dict[str, tuple[str, Any]]:
    """package -> (name, stand-in with its signature): flash-attention, and torch's as changed in 2.10."""

    def causal(q, k, v, bounds_q, bounds_k, longest_q, longest_k, right: bool) -> torch.Tensor:
        assert right
        assert bounds_q is bounds_k
        assert bounds_q.dtype == torch.int32
        assert longest_q == longest_k == int(bounds_q.diff().max())
        return flat_attention(q, k, v, bounds_q[1:].tolist())

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        return kernel(q, k, v, cu_q, cu_k, max_q, max_k, causal)

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert query.size(1) == key.size(1)
        return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)

    def of_2_11(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
    ):
        assert query.size(1) == key.size(1)
        return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))

    def of_2_12(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa
        return kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))

    kernel, torchs = causal, "torch.nn.attention.varlen"
    return {
        "flash-attn": ("flash_attn", flash_attn_varlen_func),
        "torch 2.10": (torchs, of_2_10),
        "torch 2.11": (torchs, of_2_11),
        "torch 2.12": (torchs, of_2_12),
    }


def by_bounds(call: Any) -> None:
    """Asks a kernel for three sequences, and compares."""
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = training_kernels.SequenceBounds([5, 6, 12], torch.tensor([0, 5, 6, 12], dtype=torch.int32), 6)
    torch.testing.assert_close(
        call(q, k, v, bounds), flat_attention(q, k, v, bounds.ends), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", ["flash-attn", "torch 2.10", "torch 2.11", "torch 2.12"])
def test_cuda_kernels_are_asked_in_their_own_words(monkeypatch, name):
    package, kernel = cuda_kernels()[name]
    module = SimpleNamespace(flash_attn_varlen_func=kernel, varlen_attn=kernel)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module_name: module if module_name == package else None
    )
    monkeypatch.setattr(importlib, "import_module", lambda module_name: module)
    fused = training_kernels.fused_kernel(device.Device("cuda", 0, "nccl", "stand-in"), "varlen")
    assert fused.source.startswith(package)
    by_bounds(fused.call)


def test_torch_kernel_accepts_our_arguments():
    """Signature in the installed torch; its results need a GPU to be checked."""
    kernel_choice = training_kernels._varlen_cuda()
    kernel, words, _ = kernel_choice.call.args
    inspect.signature(kernel).bind(*range(7), **words)
    assert set(words) <= {"window_size", "is_causal", "enable_gqa", "causal"}


def test_the_npu_kernel_is_asked_as_its_pages_say(monkeypatch):
    """Layout TND, ends that add up, mode 3 with the upper triangle of 2048, a scale of its own."""

    def npu_fusion_attention(
        query, key, value, head_num, input_layout, *, atten_mask, scale, sparse_mode, **ends
    ):
        assert (head_num, input_layout, sparse_mode) == (4, "TND", 3)
        assert torch.equal(atten_mask, torch.ones(2048, 2048).triu(1).bool())
        assert scale == pytest.approx(8**-0.5)
        assert ends == {"actual_seq_qlen": [5, 6, 12], "actual_seq_kvlen": [5, 6, 12]}
        return flat_attention(query, key, value, ends["actual_seq_qlen"]), None, None

    module = SimpleNamespace(npu_fusion_attention=npu_fusion_attention)
    monkeypatch.setattr(importlib, "import_module", lambda module_name: module)
    kernel = training_kernels.fused_kernel(device.Device("npu", 0, "hccl", "stand-in"), "varlen")
    assert kernel.source == "torch_npu.npu_fusion_attention"
    by_bounds(kernel.call)
