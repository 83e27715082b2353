"""Muon against `torch.optim.Muon` over Hugging Face's separate matrices, on every layout and over
checkpoints."""

from dataclasses import asdict, replace

import pytest
import torch
from helpers import oracle
from helpers.engines import DATA_SEED, MODEL, RUN, Curve, run_cases, worst
from helpers.moe import MIXTRAL

from ascendspeed.cli.train_args import resolve
from ascendspeed.config.lr_schedule import lr_at
from ascendspeed.models import param_mapping
from ascendspeed.training.engines.muon import lr_factor, matrices_of, newton_schulz
from ascendspeed.utils.errors import UserError

STEPS = 5
FEW_STEPS = 4
"""Steps of the default test."""
OPTIM = replace(RUN.optim, optimizer="muon")
GROUPED = replace(MODEL, num_query_groups=2)


def expected(optim=OPTIM, steps=STEPS) -> Curve:
    """Curve of a plain torch loop."""
    batches = oracle.batches(MODEL.vocab_size, steps, 4, RUN.data.seq_length, DATA_SEED)
    lrs = [lr_at(i, optim, RUN.train.train_iters) for i in range(steps)]
    reference = oracle.hugging_face(GROUPED, dict(param_mapping.random_tensors(GROUPED, RUN.train.seed)))
    return oracle.train(reference, batches, lrs, vars(optim), muon=True)


def case(optim=OPTIM, **parallel) -> dict:
    groups = {"model": asdict(GROUPED), "optim": asdict(optim)}
    return {"changes": {**groups, "parallel": {"zero_stage": 1, **parallel}}}


def megatron(**parallel) -> dict:
    return case(deepspeed=False, **parallel)


def compare(curves: dict[str, Curve], reference: Curve) -> None:
    for name, curve in curves.items():
        loss, norm = worst(curve, reference[-len(curve) :] if "then" in name else reference[: len(curve)])
        print(f"{name}: {loss:.1e} {norm:.1e}")
        is_equal = loss < 1e-5 and norm < 1e-5
        assert norm > 1e-3 if "control" in name else is_equal, (name, loss, norm)


def test_two_ranks_equal_torch(tmp_path):
    """Tensor parallel in both engines, and ranges of ZeRO; a checkpoint changes layout and engine."""
    at = str(tmp_path / "ckpt")
    two = {
        "zero 1, tp 2": case(),
        "megatron, tp 2, first": megatron(sequence_parallel=True) | {"last": 2, "save": at},
        "control: fused matrices": megatron() | {"break": "fused matrices"},
    }
    dp = {
        "zero 2": case(zero_stage=2),
        "megatron distributed, then": megatron(use_distributed_optimizer=True) | {"first": 2, "load": at},
        "zero 1, then": case() | {"first": 2, "load": at},
        "control: adam": case(replace(OPTIM, optimizer="adam")),
    }
    reference = expected(steps=FEW_STEPS)
    for layout, cases in {"tp2-dp1": two, "tp1-dp2": dp}.items():
        curves = run_cases(layout, cases, tmp_path / layout, FEW_STEPS, train_iters=RUN.train.train_iters)
        compare(curves, reference)


@pytest.mark.slow
def test_every_layout_equals_torch(tmp_path):
    """Also Muon's other settings, pipelines, replicated optimizers and exact resumption."""
    reference = expected()
    at = str(tmp_path / "ckpt")
    dp = {
        "zero 0": case(zero_stage=0),
        "megatron dp": megatron(),
        "megatron pp": megatron(pipeline_model_parallel_size=2),
        "megatron overlapped": megatron(overlap_grad_reduce=True, use_distributed_optimizer=True,
            overlap_param_gather=True),
        "megatron cp": megatron(context_parallel_size=2, use_distributed_optimizer=True),
        "zero 1, first": case() | {"last": 2, "save": at},
        "zero 1, then": case() | {"first": 2, "load": at},
    }  # fmt: skip
    four = {
        "zero 1, tp 2": case(sequence_parallel=True),
        "zero 2, then": case(zero_stage=2) | {"first": 2, "load": at},
        "megatron distributed": megatron(use_distributed_optimizer=True, sequence_parallel=True),
        "megatron pp": megatron(pipeline_model_parallel_size=2, sequence_parallel=True),
        "megatron pp, then": megatron(pipeline_model_parallel_size=2) | {"first": 2, "load": at},
    }
    curves = run_cases("tp1-dp2", {n: with_tp(c, 1) for n, c in dp.items()}, tmp_path / "2", STEPS,
        train_iters=RUN.train.train_iters)  # fmt: skip
    compare(curves, reference)
    whole = run_cases("tp1-dp2", {"zero 1": case()}, tmp_path / "w", STEPS, train_iters=RUN.train.train_iters)
    assert curves["zero 1, first"] + curves["zero 1, then"] == whole["zero 1"]
    compare(run_cases("tp2-dp2", four, tmp_path / "4", STEPS, train_iters=RUN.train.train_iters), reference)
    original = replace(OPTIM, muon_scale_mode="original", muon_momentum=0.8, muon_num_ns_steps=3)
    cases = {
        "original": case(original),
        "control: other momentum": case(replace(original, muon_momentum=0.9)),
    }
    curves = run_cases("tp1-dp1", cases, tmp_path / "1", STEPS, train_iters=RUN.train.train_iters)
    compare(curves, expected(original))


def with_tp(given: dict, size: int) -> dict:
    given["changes"]["parallel"]["tensor_model_parallel_size"] = size
    return given


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
@pytest.mark.parametrize("mode", ["original", "match_rms_adamw"])
def test_one_update_equals_torch(shape, mode):
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=generator)
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, adjust_lr_fn=mode).step()
    ours = newton_schulz(weight.grad, 5).float() * lr_factor(mode, *shape)
    assert torch.equal(-weight.detach(), ours)


def test_matrices_are_those_of_hugging_face():
    """Every matrix of a layer once; q, k and v, gate and up apart; the router is not among them."""
    blocks = matrices_of(GROUPED)
    sizes = {name: [sum(n for _, n in block) for block in spans] for name, spans in blocks.items()}
    layer = {name.partition("layers.0.")[2]: s for name, s in sizes.items() if "layers.0." in name}
    assert layer == {
        "self_attention.linear_qkv.weight": [64, 32, 32],
        "self_attention.linear_proj.weight": [64],
        "mlp.linear_fc1.weight": [96, 96],
        "mlp.linear_fc2.weight": [64],
    }
    assert len(blocks) == 2 * len(layer)
    assert not any("router" in name for name in matrices_of(MIXTRAL))
    assert len([name for name in matrices_of(MIXTRAL) if "local_experts.3" in name]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer muon --deepspeed --zero-stage 3", "use --zero-stage 0, 1 or 2"),
        ("--optimizer muon --deepspeed --zero-offload cpu", "leave out --zero-offload cpu"),
        ("--optimizer muon --lora-rank 4", "--optimizer adam for adapters"),
        ("--muon-momentum 0.9", "belongs to --optimizer muon"),
        ("--optimizer muon --muon-momentum 1", "below 1"),
        ("--optimizer muon --muon-num-ns-steps 100", "below 100"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message):
        resolve(["--mock-data", "--model", "internlm-tiny", *words.split()], 1)
