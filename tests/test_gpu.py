"""On a GPU: the engine against the oracle on the CPU, and the fused kernels against plain torch. `pytest -m gpu`."""

from dataclasses import replace

import launch
import oracle
import pytest
import torch
from test_engine_deepspeed import DATA_SEED, MODEL, RUN, STEPS, changes, worst

from ascendspeed import config, device, kernels, schedule, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_losses_equal_the_oracle_on_the_cpu(tmp_path):
    data = oracle.batches(MODEL.vocab_size, STEPS, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED)
    lrs = [schedule.lr_at(i, RUN.optim, STEPS) for i in range(STEPS)]
    expected = oracle.train(
        oracle.hugging_face(MODEL, dict(weights.random_tensors(MODEL, RUN.train.seed))), data, lrs, vars(RUN.optim)
    )
    cases = {f"fp32 zero {stage}": {"changes": changes(stage)} for stage in range(4)}
    cases |= {f"bf16 zero {stage}": {"changes": changes(stage, bf16=True)} for stage in (1, 2, 3)}
    cases |= {"fp16 zero 2": {"changes": changes(2, fp16=True, initial_loss_scale=1024.0)}}
    cases["control: beta2 0.94"] = {"changes": changes(1, adam_beta2=0.94)}
    job = {"run": config.to_dict(RUN), "steps": STEPS, "data_seed": DATA_SEED, "cases": cases, "device": "cuda"}
    for name, curve in launch.ranks(1, "engine_worker.py", job, tmp_path).items():
        loss, _ = worst(curve, expected)
        if name.startswith("control"):
            assert loss > 5e-5
        else:
            assert loss < (5e-5 if name.startswith("fp32") else 5e-3), (name, loss)


def test_the_same_layout_resumes_bit_identically(tmp_path):
    change, at = changes(2, bf16=True), str(tmp_path / "ckpt")
    cases = {
        "whole": {"changes": change},
        "first": {"changes": change, "last": 4, "save": at},
        "then": {"changes": change, "first": 4, "load": at},
    }
    run = replace(RUN, train=replace(RUN.train, attention_dropout=0.1, hidden_dropout=0.1))
    job = {"run": config.to_dict(run), "steps": 8, "data_seed": DATA_SEED, "cases": cases, "device": "cuda"}
    curves = launch.ranks(1, "engine_worker.py", job, tmp_path)
    assert curves["first"] + curves["then"] == curves["whole"]


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_a_fused_kernel_gives_torchs_values_and_gradients(operation):
    here = device.Device("cuda", 0, "nccl", "")
    found = device.fused(here, operation)
    if found is None:
        pytest.skip("no fused kernel is installed")
    x = torch.randn(64, 2, 512, device="cuda", requires_grad=True)
    weight = torch.randn(512, device="cuda", requires_grad=True)
    inputs = (x, weight, 1e-6) if operation == "rms_norm" else (x,)
    results = []
    for call in (found.call, getattr(kernels, operation)):
        x.grad = weight.grad = None
        out = call(*inputs)
        (out * torch.arange(out.size(-1), device="cuda")).sum().backward()
        results.append([out.detach(), x.grad, *([weight.grad] if operation == "rms_norm" else [])])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-3)
