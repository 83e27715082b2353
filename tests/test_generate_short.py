"""Inference fast paths of linears, layers and a folded NormHead: bit-identical to the ordinary forward."""

import pytest
import torch
from helpers import launch
from helpers.family_models import MODELS
from helpers.generation import language_model
from helpers.models import ours, tensors_of
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

TOKENS = torch.randint(0, 125, (3, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def megatron_forward(monkeypatch):
    """Returns a function that switches the linears to Megatron-core's forward."""

    def take():
        from ascendspeed.models.gpt.linear import ColumnLinear, RowLinear

        monkeypatch.setattr(ColumnLinear, "forward", ColumnParallelLinear.forward)
        monkeypatch.setattr(RowLinear, "forward", RowParallelLinear.forward)

    return take


def logits(cpu, name: str) -> torch.Tensor:
    with torch.no_grad():
        return ours(cpu, MODELS[name], tensors_of(MODELS[name])).eval()(TOKENS, None, None)[..., :125]


@pytest.mark.parametrize("name", MODELS)
def test_linears(cpu, name, megatron_forward):
    fast = logits(cpu, name)
    megatron_forward()
    assert torch.equal(fast, logits(cpu, name))


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_generation(cpu, name, megatron_forward):
    """Prefill compared with the model's own forward pass; the control is below."""
    lm = language_model(cpu, MODELS[name], tensors_of(MODELS[name]))
    with torch.inference_mode():
        lm.allocate_cache(3, 24, [24])
        hidden = torch.stack(lm.prefill(TOKENS.tolist(), positions=[range(24)] * 3))
        actual = lm.logits(hidden.flatten(0, 1)).view(3, 24, -1)
    megatron_forward()
    expected = logits(cpu, name)
    assert torch.equal(actual, expected), float((actual - expected).abs().max())


def test_missing_bias_shows(cpu, monkeypatch, megatron_forward):
    """Control of both tests above."""
    from ascendspeed.models.gpt.linear import RowLinear

    forward = RowLinear.forward
    monkeypatch.setattr(RowLinear, "forward", lambda self, given: (forward(self, given)[0], None))
    fast = logits(cpu, "internlm")
    megatron_forward()
    assert not torch.equal(fast, logits(cpu, "internlm"))


def test_two_ranks(tmp_path):
    """Includes all-reduce and all-gather of tensor parallelism. Control: a missing all-reduce."""
    equal = launch.ranks(2, "linear_worker.py", {}, tmp_path)
    assert not equal.pop("not summed")
    assert equal == dict.fromkeys(("column", "own weight", "gathered", "row", "row, bias apart"), True)
