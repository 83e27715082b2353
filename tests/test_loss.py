"""The loss on vocabulary shards against torch's cross entropy in fp64, with one rank and two (as threads)."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import ReduceOp
from torch.nn import functional as F

S, B, V = 6, 3, 50


class Ranks:
    """torch.distributed for ranks that are threads of this process."""

    ReduceOp = ReduceOp

    def __init__(self, size: int) -> None:
        self.size, self.here = size, threading.local()
        self.meet, self.given = threading.Barrier(size), [None] * size

    def get_rank(self, group: None) -> int:
        return self.here.rank

    def get_world_size(self, group: None) -> int:
        return self.size

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM, group: None = None) -> None:
        self.given[self.here.rank] = tensor.clone()
        self.meet.wait(10)
        stacked = torch.stack(self.given)
        self.meet.wait(10)
        tensor.copy_(stacked.amax(0) if op == ReduceOp.MAX else stacked.sum(0))

    def run(self, work) -> list:
        """Runs `work(rank)` on every rank and returns the results."""
        results = [None] * self.size

        def run_rank(rank: int) -> None:
            self.here.rank = rank
            results[rank] = work(rank)

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert None not in results
        return results


def inputs(vocabulary: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp64 logits, labels, and the gradient of every token's loss: some of them zero, as under a mask."""
    generator = torch.Generator().manual_seed(2)
    logits = 20 * torch.randn(S, B, vocabulary, dtype=torch.float64, generator=generator)
    labels = torch.randint(vocabulary, (S, B), generator=generator)
    return (
        logits,
        labels,
        torch.rand(S, B, generator=generator) * (torch.rand(S, B, generator=generator) < 0.8),
    )


def expected(
    logits: torch.Tensor, labels: torch.Tensor, arriving: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.detach(), torch.autograd.grad(losses, logits, arriving.double())[0]


def ours(
    monkeypatch, logits, labels, arriving, ranks: int = 1, kernel=None, **terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (the same on every rank, or the test fails) and the shards' gradients side by side."""
    from ascendspeed.models.gpt import cross_entropy as loss

    world = Ranks(ranks)
    monkeypatch.setattr(loss, "dist", world)
    shards = [shard.clone() for shard in logits.chunk(ranks, -1)]

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard = shards[rank].requires_grad_()
        losses = loss.cross_entropy(shard * 1, labels, None, loss.LossTerms(**terms), kernel)
        return losses.detach(), torch.autograd.grad(losses, shard, arriving)[0]

    results = world.run(work)
    assert all(torch.equal(losses, results[0][0]) for losses, _ in results)
    return results[0][0], torch.cat([gradient for _, gradient in results], -1)


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
