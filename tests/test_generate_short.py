"""Where no gradient is wanted, linears, layers and a settled NormHead go a shorter way: to the same bits."""

import pytest
import torch
from helpers import launch
from helpers.family_models import MODELS
from helpers.generation import language_model
from helpers.models import ours, tensors_of
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

TOKENS = torch.randint(0, 125, (3, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def long_way(monkeypatch):
    """Megatron-core's own way."""

    def take():
        from ascendspeed.models.gpt.linear import ColumnLinear, RowLinear

        monkeypatch.setattr(ColumnLinear, "forward", ColumnParallelLinear.forward)
        monkeypatch.setattr(RowLinear, "forward", RowParallelLinear.forward)

    return take


def logits(cpu, name: str) -> torch.Tensor:
    with torch.no_grad():
        return ours(cpu, MODELS[name], tensors_of(MODELS[name])).eval()(TOKENS, None, None)[..., :125]


@pytest.mark.parametrize("name", MODELS)
def test_linears(cpu, name, long_way):
    short = logits(cpu, name)
    long_way()
    assert torch.equal(short, logits(cpu, name))


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_generation(cpu, name, long_way):
    """A prompt that is read into the cache, against the model's own forward pass; its control is below."""
    asked = language_model(cpu, MODELS[name], tensors_of(MODELS[name]))
    with torch.inference_mode():
        asked.allocate_cache(3, 24, [24])
        hidden = torch.stack(asked.prefill(TOKENS.tolist(), positions=[range(24)] * 3))
        found = asked.logits(hidden.flatten(0, 1)).view(3, 24, -1)
    long_way()
    wanted = logits(cpu, name)
    assert torch.equal(found, wanted), float((found - wanted).abs().max())


def test_a_bias_that_is_lost_shows(cpu, monkeypatch, long_way):
    """The control of both."""
    from ascendspeed.models.gpt.linear import RowLinear

    forward = RowLinear.forward
    monkeypatch.setattr(RowLinear, "forward", lambda self, given: (forward(self, given)[0], None))
    short = logits(cpu, "internlm")
    long_way()
    assert not torch.equal(short, logits(cpu, "internlm"))


def test_two_ranks(tmp_path):
    """The sum and the gathering of tensor parallel too; control: a sum that was forgotten."""
    same = launch.ranks(2, "linear_worker.py", {}, tmp_path)
    assert not same.pop("not summed")
    assert same == dict.fromkeys(("column", "own weight", "gathered", "row", "row, bias apart"), True)
