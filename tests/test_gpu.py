"""On a GPU: the engine against the CPU oracle, fused kernels against plain torch. `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch
from helpers import launch, oracle, packed_batches
from helpers.engines import DATA_SEED, MODEL, RUN, STEPS, changes, worst
from helpers.packed_attention import INTERNLM, flat_attention

from ascendspeed.config import lr_schedule, schema
from ascendspeed.distributed import device, fused_kernels, training_kernels
from ascendspeed.models import param_mapping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_losses_equal_the_oracle_on_the_cpu(tmp_path):
    data = oracle.batches(
        MODEL.vocab_size, STEPS, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED
    )
    lrs = [lr_schedule.lr_at(i, RUN.optim, STEPS) for i in range(STEPS)]
    expected = oracle.train(
        oracle.hugging_face(MODEL, dict(param_mapping.random_tensors(MODEL, RUN.train.seed))),
        data,
        lrs,
        vars(RUN.optim),
    )
    cases = {f"fp32 zero {stage}": {"changes": changes(stage)} for stage in range(4)}
    cases |= {f"bf16 zero {stage}": {"changes": changes(stage, bf16=True)} for stage in (1, 2, 3)}
    cases |= {"fp16 zero 2": {"changes": changes(2, fp16=True, initial_loss_scale=1024.0)}}
    cases["control: beta2 0.94"] = {"changes": changes(1, adam_beta2=0.94)}
    job = {
        "run": schema.to_dict(RUN),
        "steps": STEPS,
        "data_seed": DATA_SEED,
        "cases": cases,
        "device": "cuda",
    }
    for name, curve in launch.ranks(1, "engine_worker.py", job, tmp_path).items():
        loss, _ = worst(curve, expected)
        if name.startswith("control"):
            assert loss > 5e-5
        else:
            assert loss < (5e-5 if name.startswith("fp32") else 5e-3), (name, loss)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_layout_resumes_bit_identically(dropout, tmp_path):
    change, at = changes(2, bf16=True), str(tmp_path / "ckpt")
    cases = {
        "whole": {"changes": change},
        "first": {"changes": change, "last": 4, "save": at},
        "then": {"changes": change, "first": 4, "load": at},
    }
    run = replace(RUN, train=replace(RUN.train, attention_dropout=dropout, hidden_dropout=dropout))
    job = {"run": schema.to_dict(run), "steps": 8, "data_seed": DATA_SEED, "cases": cases, "device": "cuda"}
    job["deterministic"] = True
    curves = launch.ranks(1, "engine_worker.py", job, tmp_path)
    assert curves["first"] + curves["then"] == curves["whole"]


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_a_fused_kernel_gives_torchs_values_and_gradients(operation):
    here = device.Device("cuda", 0, "nccl", "")
    kernel = training_kernels.fused_kernel(here, operation)
    if kernel is None:
        pytest.skip("no fused kernel is installed")
    x = torch.randn(64, 2, 512, device="cuda", requires_grad=True)
    weight = torch.randn(512, device="cuda", requires_grad=True)
    inputs = (x, weight, 1e-6) if operation == "rms_norm" else (x,)
    results = []
    for call in (kernel.call, getattr(fused_kernels, operation)):
        x.grad = weight.grad = None
        out = call(*inputs)
        (out * torch.arange(out.size(-1), device="cuda")).sum().backward()
        results.append([out.detach(), x.grad, *([weight.grad] if operation == "rms_norm" else [])])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_packed_documents_equal_the_oracle_on_the_cpu(tmp_path):
    """fp32 by SDPA, document by document; bf16 by the device's own kernel."""
    batches, rows = packed_batches.packed()
    expected, _ = packed_batches.trained(INTERNLM, batches, rows, STEPS, tmp_path)
    data = packed_batches.written(batches, tmp_path / "data")
    layouts = {"zero 2": packed_batches.ZERO[2], "megatron": {}}
    cases = {f"fp32 {name}": packed_batches.case(layout, data, STEPS) for name, layout in layouts.items()}
    cases |= {
        f"bf16 {name}": packed_batches.case(layout, data, STEPS, optim={"bf16": True})
        for name, layout in layouts.items()
    }
    cases["control"] = packed_batches.case({}, data, STEPS, **{"break": "documents see each other"})
    job = {
        "run": schema.to_dict(packed_batches.RUN),
        "steps": STEPS,
        "data_seed": 0,
        "cases": cases,
        "device": "cuda",
    }
    for name, curve in launch.ranks(1, "engine_worker.py", job, tmp_path / "ranks").items():
        loss, _ = worst(curve, expected)
        if name == "control":
            assert loss > 5e-3
        else:
            assert loss < (5e-5 if name.startswith("fp32") else 5e-3), (name, loss)


@pytest.mark.parametrize("groups", [8, 2])
def test_the_kernel_for_documents_gives_the_values_and_gradients_of_all_scores_masked(groups):
    """Against fp64: no coarser than SDPA on each document."""
    kernel = training_kernels.fused_kernel(device.Device("cuda", 0, "nccl", ""), "varlen")
    if kernel is None:
        pytest.skip("no kernel for sequences of various lengths is installed")
    ends = [1, 300, 301, 428, 1024]
    bounds = training_kernels.SequenceBounds(
        ends, torch.tensor([0, *ends], dtype=torch.int32, device="cuda"), 596
    )
    q, k, v = (
        torch.randn(1024, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, groups, groups)
    )
    gradient = torch.randn_like(q)

    def by_sdpa(q, k, v):
        parts = zip(*(x.split([1, 299, 1, 127, 596]) for x in (q, k, v)), strict=True)
        document = (tuple(x.transpose(0, 1)[None] for x in part) for part in parts)
        attend = torch.nn.functional.scaled_dot_product_attention
        return torch.cat(
            [attend(*qkv, is_causal=True, enable_gqa=True)[0].transpose(0, 1) for qkv in document]
        )

    def values(call, dtype):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = call(*given)
        return [out.detach(), *torch.autograd.grad(out, given, gradient.to(dtype))]

    exact = values(lambda *qkv: flat_attention(*(x.cpu() for x in qkv), ends).cuda(), torch.float64)
    actual, sdpa = (
        values(lambda *qkv: kernel.call(*qkv, bounds), torch.bfloat16),
        values(by_sdpa, torch.bfloat16),
    )
    for fused, other, right in zip(actual, sdpa, exact, strict=True):
        errors = [(x.double() - right).square().mean().sqrt() for x in (fused, other)]
        assert errors[0] < 1.2 * errors[1]
        assert errors[0] < 1e-2 * right.square().mean().sqrt()
