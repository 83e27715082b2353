"""Estimates against known parameter counts, measured sizes, and FLOPs counted by torch."""

import dataclasses

import pytest
import torch
from helpers import oracle
from transformers import AutoModelForCausalLM

from ascendspeed.config.schema import ModelConfig, ParallelConfig, padded_vocab_size
from ascendspeed.models import estimates, param_mapping
from ascendspeed.models.families import PRESETS

GIB = 2**30
SHAPES = {
    **PRESETS,
    "gqa": ModelConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=2,
        ffn_hidden_size=96,
        vocab_size=125,
    ),
    "wide-heads": ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        kv_channels=32,
        ffn_hidden_size=96,
        add_dense_bias=False,
    ),
    "tied": ModelConfig(
        family="llama", num_layers=2, hidden_size=64, num_attention_heads=4, tie_embeddings=True
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_equal_the_table(name):
    model = SHAPES[name]
    assert estimates.parameter_count(model) == sum(
        torch.Size(p.shape).numel() for p in param_mapping.parameters(model)
    )


COUNTS = {  # of the published models, each once; 2.5 has the sizes of 2
    "internlm-7b": 7_321_948_160,
    "internlm-20b": 20_088_714_240,
    "internlm-65b": 66_454_298_624,
    "internlm2-1.8b": 1_889_110_016,
    "internlm2-7b": 7_737_708_544,
    "internlm2-20b": 19_861_149_696,
    "internlm2.5-1.8b": 1_889_110_016,
    "internlm2.5-7b": 7_737_708_544,
    "internlm2.5-20b": 19_861_149_696,
    "internlm2.5-7b-1m": 7_737_708_544,
    "internlm3-8b": 8_804_241_408,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "baichuan2-7b": 7_505_973_248,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


QUICK = {
    min((n for n in COUNTS if PRESETS[n].family == family), key=COUNTS.__getitem__)
    for family in {PRESETS[name].family for name in COUNTS}
}
"""The smallest model of each family; the other sizes are slow."""


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS]
)
def test_known_counts(name):
    """Counts equal those computed by hand, and those of Hugging Face's class on the meta device."""
    model = PRESETS[name]
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(oracle.config_of(model))
    assert sum(p.numel() for p in reference.parameters()) == COUNTS[name]
    assert estimates.parameter_count(model) == COUNTS[name]
    assert estimates.checkpoint_bytes(model) == 12 * COUNTS[name]


def test_every_size_has_its_count():
    assert set(COUNTS) == {name for name in PRESETS if not name.endswith("-tiny")}


def test_active_parameters():
    """Inactive experts: 6 of 8 in each of 32 layers; 56 of 60 in each of 24."""
    counts = {
        name: estimates.active_parameter_count(PRESETS[name])
        for name in ("mixtral-8x7b", "qwen1.5-moe-a2.7b", "gemma-2b")
    }
    assert counts["mixtral-8x7b"] == COUNTS["mixtral-8x7b"] - 32 * 6 * 3 * 4096 * 14336
    assert counts["qwen1.5-moe-a2.7b"] == COUNTS["qwen1.5-moe-a2.7b"] - 24 * 56 * 3 * 2048 * 1408
    assert counts["gemma-2b"] == COUNTS["gemma-2b"]


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("name", ["internlm-7b", "gqa", "gemma-2b", "mixtral-8x7b"])
def test_parameters_of_one_rank(name, tp):
    model, parallel = SHAPES[name], ParallelConfig(tensor_model_parallel_size=tp)
    cuts = (p.shard_spec(tp, padded_vocab_size(model, parallel)) for p in param_mapping.parameters(model))
    assert estimates.parameters_per_device(model, parallel) == sum(
        torch.Size(cut.shard_shape).numel() for cut in cuts
    )


def test_pipeline_stages_share_the_layers():
    model = PRESETS["internlm-65b"]
    whole = estimates.parameters_per_device(model, ParallelConfig())
    stage = estimates.parameters_per_device(model, ParallelConfig(pipeline_model_parallel_size=4))
    assert whole / 4 < stage < whole / 4 + model.vocab_size * model.hidden_size


@pytest.mark.parametrize("name", ["internlm-7b", "gemma-7b", "baichuan2-tiny"])
def test_the_fullest_pipeline_stage(name):
    """Two stages: the first has the embedding; the last has final norm and output (a copy if tied)."""
    model, parallel = (
        SHAPES[name],
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    )
    sizes = {
        p.name: torch.Size(p.shard_spec(2, padded_vocab_size(model, parallel)).shard_shape).numel()
        for p in param_mapping.parameters(model)
    }
    layers = sum(size for n, size in sizes.items() if n.startswith("decoder.layers.")) // 2
    last = (
        sizes.get("output_layer.weight", sizes["embedding.word_embeddings.weight"])
        + sizes["decoder.final_layernorm.weight"]
    )
    assert estimates.parameters_per_device(model, parallel) == layers + last


def test_flops_of_the_recipe():
    assert estimates.flops_per_token(PRESETS["internlm-7b"], 2048) == pytest.approx(43.0e9, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["internlm-tiny", "gqa", "wide-heads", "tied", "gemma-tiny", "internlm3-tiny"]
)
def test_flops_counted_by_torch(name):
    """Forward FLOPs of matrix products on meta tensors; backward is double, causal attention half."""
    from torch.utils.flop_counter import FlopCounterMode

    model, s = dataclasses.replace(SHAPES[name], num_layers=1), 64
    d, heads = model.head_dim, model.num_attention_heads
    with FlopCounterMode(display=False) as linear:
        for p in param_mapping.parameters(model):
            if len(p.shape) == 2 and (model.tie_embeddings or "word_embeddings" not in p.name):
                torch.empty(s, p.shape[1], device="meta") @ torch.empty(p.shape, device="meta").T
    with FlopCounterMode(display=False) as attention:
        scores = torch.empty(heads, s, d, device="meta") @ torch.empty(heads, d, s, device="meta")
        scores @ torch.empty(heads, s, d, device="meta")
    counted = 3 * (linear.get_total_flops() + attention.get_total_flops() / 2) / s
    assert estimates.flops_per_token(model, s) == pytest.approx(counted)
    assert estimates.flops_per_token(model, 2 * s) != pytest.approx(counted)


@pytest.mark.parametrize(
    ("name", "tp", "stage", "dp", "gib"),
    [
        ("internlm-7b", 1, 1, 8, 37.5),
        ("internlm-7b", 1, 2, 8, 25.6),
        ("internlm-7b", 1, 3, 8, 13.6),
        ("internlm-65b", 1, 3, 32, 30.9),
        ("internlm-65b", 8, 1, 4, 54.2),
        ("internlm-65b", 8, 2, 4, 42.5),
    ],
)
def test_model_states_as_measured(name, tp, stage, dp, gib):
    states = estimates.model_states(
        PRESETS[name], ParallelConfig(tensor_model_parallel_size=tp, zero_stage=stage), dp, "bf16"
    )
    assert states.total / GIB == pytest.approx(gib, abs=0.07)


def test_model_states_follow_the_layout():
    model = PRESETS["internlm-7b"]
    count = estimates.parameter_count(model)

    def bytes_per_parameter(stage, dp, dtype, **more):
        return (
            estimates.model_states(model, ParallelConfig(zero_stage=stage), dp, dtype, **more).total / count
        )

    assert bytes_per_parameter(0, 8, "fp32") == 16
    assert bytes_per_parameter(1, 1, "bf16") == bytes_per_parameter(3, 1, "bf16") == 16
    assert bytes_per_parameter(1, 4, "bf16", fp32_gradients=True) == 6 + 12 / 4
    assert bytes_per_parameter(2, 4, "bf16", fp32_gradients=True) == 2 + 16 / 4
    assert bytes_per_parameter(1, 4, "bf16", fp32_gradients=True, param_remainders=True) == 6 + 10 / 4
    assert bytes_per_parameter(1, 4, "fp16", fp32_gradients=True) == 4 + 12 / 4  # bf16's option
    for dtype in ("bf16", "fp32"):
        by_stage = [bytes_per_parameter(stage, 8, dtype) for stage in (1, 2, 3)]
        assert by_stage == sorted(by_stage, reverse=True)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", None),
        ("Ascend910B3", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_known_peaks(device, peak):
    assert estimates.peak_tflops(device) == peak
