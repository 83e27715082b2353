"""Backend of torch's attention (--sdpa-backend): the choice by a stand-in clock, its use, refusals."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import engines

from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.utils.errors import UserError

TIMES = {"flash": 2e-3, "cudnn": 1e-3, "efficient": 3e-3}


GPU = SimpleNamespace(kind="gpu", has_sdpa_backends=True)
"""Device with several backends."""


def run_with(backend, **changes):
    train = replace(engines.RUN.train, sdpa_backend=backend, **changes.pop("train", {}))
    return replace(engines.RUN, train=train, parallel=replace(engines.RUN.parallel, **changes))


def clock(times):
    def timer(name, shape, device):
        if name not in times:
            raise RuntimeError("no kernel for this shape")
        return times[name]

    return timer


def test_auto_takes_the_fastest_that_runs(cpu):
    from ascendspeed.distributed import sdpa_backend

    def choose(times, backend="auto", device=GPU, **changes):
        return sdpa_backend.choose(run_with(backend, **changes), device, clock(times))

    assert choose(TIMES) == (
        "cudnn",
        "torch SDPA, cudnn (measured: flash 2 ms, cudnn 1 ms, efficient 3 ms)",
    )
    assert choose({"efficient": 3e-3})[0] == "efficient"
    assert choose({}) == (None, "torch SDPA (no other backend runs)")
    assert choose(TIMES, "default") == (None, "torch SDPA")
    assert choose(TIMES, "flash") == ("flash", "torch SDPA, flash")
    assert choose(TIMES, device=cpu) == (None, "torch SDPA")  # without a measurement
    assert choose(TIMES, train={"deterministic": True})[0] is None
    assert choose(TIMES, context_parallel_size=2)[0] is None
    for backend, device, changes, message in (
        ("flash", cpu, {}, "a cpu has no such backend"),
        ("cudnn", GPU, {"train": {"deterministic": True}}, "does not go with --deterministic"),
        ("flash", GPU, {"context_parallel_size": 2}, "has no masks"),
        ("efficient", GPU, {}, "does not run for .*no kernel for this shape"),
    ):
        with pytest.raises(UserError, match=message):
            choose({"flash": 1.0, "cudnn": 1.0}, backend, device, **changes)


def test_the_backend_of_a_run_is_used(cpu, monkeypatch):
    import torch
    from torch.nn import functional as F

    from ascendspeed.distributed import sdpa_backend
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    model, layout = replace(engines.MODEL, num_layers=1), ParallelConfig()
    sdpa, enabled = F.scaled_dot_product_attention, []

    def watched(*args, **kwargs):
        enabled.append(torch.backends.cuda.flash_sdp_enabled())
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    losses = {}
    for backend in ("math", None):
        kernels = Kernels(sdpa_backend=backend)
        config = layer_spec.transformer_config(model, layout, TrainConfig(), "fp32", kernels)
        built = gpt_model.build_model(model, layout, config)
        gpt_model.load_weights(built, model, layout, param_mapping.random_tensors(model, 3))
        tokens = torch.arange(24)[None]
        with torch.no_grad():
            losses[backend] = built(tokens, tokens, None, labels=tokens.roll(-1, 1))
    assert enabled == [False, True]
    torch.testing.assert_close(losses["math"], losses[None], rtol=1e-5, atol=1e-6)
    assert sdpa_backend.seconds("math", sdpa_backend.AttentionShape.of(engines.RUN), cpu) > 0
