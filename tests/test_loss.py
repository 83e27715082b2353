"""The loss on vocabulary shards against torch's cross entropy in fp64, with one rank and two (as threads)."""

from types import SimpleNamespace

import pytest
import torch
from helpers.vocabulary_shards import B, S, V, expected, inputs, ours
from torch.nn import functional as F


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_equals_torch(cpu, monkeypatch, ranks):
    logits, labels, arriving = inputs()
    logits = logits.float()
    losses, gradient = expected(logits, labels, arriving)
    actual, back = ours(monkeypatch, logits, labels, arriving, ranks)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(back.double(), gradient, rtol=1e-5, atol=1e-6)
    assert (
        ours(monkeypatch, logits, labels.roll(1, 0), arriving, ranks)[1] - back
    ).abs().max() > 0.1  # labels count


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_rounds_only_the_gradient(cpu, monkeypatch, ranks):
    logits, labels, arriving = inputs()
    logits = logits.bfloat16()
    losses, gradient = expected(logits, labels, arriving)
    actual, back = ours(monkeypatch, logits, labels, arriving, ranks)
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(back.double(), gradient, rtol=2**-8, atol=1e-6)


def test_many_pieces(cpu, monkeypatch):
    logits, labels, arriving = inputs(1 << 17)  # four rows to a piece: 18 rows leave a short last one
    logits = logits.float()
    losses, gradient = expected(logits, labels, arriving)
    actual, back = ours(monkeypatch, logits, labels, arriving)
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(back.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_weighs_nothing(cpu, monkeypatch, ranks):
    """Rows of padding are -1e9: with two ranks the second has nothing else."""
    logits, labels, arriving = inputs()
    padded = torch.cat((logits, torch.full_like(logits, -1e9)), -1).float()
    losses, gradient = expected(logits, labels, arriving)
    actual, back = ours(monkeypatch, padded, labels, arriving, ranks)
    torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(back[..., :V].double(), gradient, rtol=1e-5, atol=1e-5)
    assert not back[..., V:].any()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 1e-3), (0.2, 1e-2)])
def test_further_terms_change_the_gradient_as_in_torch(cpu, monkeypatch, ranks, smoothing, z):
    """Label smoothing and z-loss over the vocabulary without its padding; the losses stay those without."""
    logits, labels, arriving = inputs()
    exact = logits.clone().requires_grad_()
    flat = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing)
    total = flat.view_as(labels) + z * exact.logsumexp(-1).square()
    gradient = torch.autograd.grad(total, exact, arriving.double())[0]
    padded = torch.cat((logits, torch.full((S, B, 14), -1e9, dtype=torch.float64)), -1).float()
    terms = {"label_smoothing": smoothing, "z_coeff": z, "vocab_size": V}
    losses, back = ours(monkeypatch, padded, labels, arriving, ranks, **terms)
    torch.testing.assert_close(losses.double(), expected(logits, labels, arriving)[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(back[..., :V].double(), gradient, rtol=1e-5, atol=2e-6)
    assert not back[..., V:].any()
    plain = ours(monkeypatch, padded, labels, arriving, ranks)[1]
    assert (plain[..., :V].double() - gradient).abs().max() > 1e-3


def test_a_masked_label_outside_the_vocabulary(cpu, monkeypatch):
    logits, labels, arriving = inputs()
    labels[0], arriving[0] = -100, 0.0
    for ranks in (1, 2):
        losses, back = ours(monkeypatch, logits.float(), labels, arriving, ranks)
        assert losses.isfinite().all()
        assert not back[0].any()
        assert back[1:].any()


def test_a_second_backward_is_refused(cpu, monkeypatch):
    from ascendspeed.models.gpt import cross_entropy as loss

    monkeypatch.setattr(
        loss, "dist", SimpleNamespace(get_rank=lambda group: 0, get_world_size=lambda group: 1)
    )
    logits, labels, _ = inputs()
    logits = logits.float().requires_grad_()
    total = loss.cross_entropy(logits * 1, labels, None).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()
