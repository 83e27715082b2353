"""Compiled layers (--compile): one graph each, equal losses, unchanged names, refusals."""

from dataclasses import replace

import pytest
from helpers import engines

from ascendspeed.cli.train_args import resolve
from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.distributed import layer_compiler
from ascendspeed.distributed.layer_compiler import LayerCompiler
from ascendspeed.utils.errors import UserError

FP32 = 1e-5
"""Largest relative difference of a loss."""


def losses_of(rows, compiler, mistake=None):
    """Token losses of rows [documents' lengths], gradients by name, and the parameters' names."""
    import torch

    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec
    from ascendspeed.models.gpt.packed_sequences import packed_sequences_of

    model, layout = replace(engines.MODEL, num_layers=1), ParallelConfig()
    kernels = Kernels(layer_compiler=compiler)
    config = layer_spec.transformer_config(model, layout, TrainConfig(), "fp32", kernels)
    built = gpt_model.build_model(model, layout, config)
    gpt_model.load_weights(built, model, layout, param_mapping.random_tensors(model, 3))
    if mistake:
        mistake(built.decoder.layers[0])
    ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    tokens = torch.arange(ids.numel()).view_as(ids) * 7 % model.vocab_size
    packed = packed_sequences_of(ids)
    losses = built(tokens, ids, None, labels=tokens.roll(-1, 1), packed_seq_params=packed)
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in built.named_parameters()}


def test_a_layer_is_one_graph(cpu):
    import torch
    from torch._dynamo.utils import counters

    counters.clear()
    for rows in ([[5, 19], [24]], [[20, 4], [7, 17]]):
        plain, compiled = losses_of(rows, None), losses_of(rows, LayerCompiler("eager"))
        torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=0)
        for name, gradient in plain[1].items():
            assert (compiled[1][name] - gradient).norm() < FP32 * gradient.norm(), name
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # for documents of whatever lengths

    def break_graph(layer):
        layer.input_layernorm.register_forward_hook(lambda *_: torch._dynamo.graph_break())

    with pytest.raises(torch._dynamo.exc.Unsupported):
        losses_of([[24]], LayerCompiler("eager"), break_graph)


FLAGS = ["--data-path", "x", "--compile"]


UNCOMPILED = {
    "TP above 1": {"parallel": {"tensor_model_parallel_size": 2}},
    "CP above 1": {"parallel": {"context_parallel_size": 2}},
    "ZeRO-3": {"parallel": {"zero_stage": 3}},
    "selective": {"train": {"recompute_granularity": "selective"}},
    "attention dropout": {"train": {"attention_dropout": 0.1}},
    "LoRA dropout": {"lora": {"lora_rank": 4, "lora_dropout": 0.1}},
    "experts": {"model": {"num_experts": 4}},
}


def test_layers_that_stay_uncompiled_are_named():
    assert layer_compiler.obstacle(engines.RUN) is None
    for reason, changes in UNCOMPILED.items():
        run = engines.RUN
        for group, values in changes.items():
            run = replace(run, **{group: replace(getattr(run, group), **values)})
        assert layer_compiler.obstacle(run).startswith(reason)


def test_refusals(monkeypatch, cpu):
    for words, message in (
        ([*FLAGS[:2], "--compile-activation-memory-budget", "0.5"], "belongs to --compile"),
        ([*FLAGS, "--compile-activation-memory-budget", "0"], "above 0"),
        ([*FLAGS, "--compile-activation-memory-budget", "1.5"], "at most 1"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(words, 1)
    run, _ = resolve([*FLAGS, "--compile-activation-memory-budget", "0.5"], 1)
    compiler, text = layer_compiler.choose(run, cpu)
    assert compiler == LayerCompiler(memory_budget=0.5)
    assert text == "torch.compile, one graph each, activation memory budget 0.5"
    with pytest.raises(UserError, match="no compiler for npu"):
        layer_compiler.check_compiler(replace(cpu, kind="npu"))
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        layer_compiler.check_compiler(cpu)


MEGATRON, FSDP = {"deepspeed": False}, {"deepspeed": False, "use_torch_fsdp2": True}
SETTINGS = {
    "Megatron": {"parallel": MEGATRON},
    "Megatron, recomputed": {"parallel": MEGATRON, "train": {"recompute_granularity": "full"}},
    "Megatron, dropout": {"parallel": MEGATRON, "train": {"hidden_dropout": 0.1}},
    "FSDP": {"parallel": FSDP},
    "ZeRO-1": {"parallel": {"zero_stage": 1}},
    "ZeRO-2, recomputed": {"parallel": {"zero_stage": 2}, "train": {"recompute_granularity": "full"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp1-dp1", "tp1-dp2"])
def test_losses_of_both_engines_are_those_of_uncompiled_layers(layout, tmp_path):
    cases = {}
    for name, changes in SETTINGS.items():
        cases[name] = {"changes": changes, "last": 4}
        cases[f"{name}: compiled"] = {"changes": changes, "last": 4, "compile": "inductor"}
    curves = engines.run_cases(layout, cases, tmp_path)
    for name in SETTINGS:
        loss, norm = engines.worst(curves[f"{name}: compiled"], curves[name])
        assert loss < FP32, name
        assert norm < 1e-4, name
    # Control: dropout that is not compiled alike.
    assert engines.worst(curves["Megatron, dropout"], curves["Megatron"])[0] > 1e-3


@pytest.mark.slow
def test_a_run_resumes_into_compiled_layers_and_out_of_them(tmp_path):
    halves = {}
    for engine, parallel in {"megatron": MEGATRON, "zero": {"zero_stage": 1}}.items():
        for compiled in (False, True):
            at = str(tmp_path / f"{engine}-{compiled}")
            own, other = ({"compile": "inductor"} if x else {} for x in (compiled, not compiled))
            changes = {"parallel": parallel}
            halves[f"{engine} {compiled}"] = {"changes": changes, "last": 4, **own}
            halves[f"{engine} {compiled}: first"] = {"changes": changes, "last": 2, "save": at, **own}
            halves[f"{engine} {compiled}: then"] = {
                "changes": changes,
                "first": 2,
                "last": 4,
                "load": at,
                **other,
            }
    curves = engines.run_cases("tp1-dp1", halves, tmp_path / "run")
    for engine in ("megatron", "zero"):
        whole = curves[f"{engine} False"]
        for compiled in (False, True):
            assert curves[f"{engine} {compiled}: first"] == curves[f"{engine} {compiled}"][:2]
            loss, _ = engines.worst(curves[f"{engine} {compiled}: then"], whole[2:])
            assert loss < FP32
