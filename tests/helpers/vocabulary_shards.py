"""The loss on vocabulary shards of ranks that are threads, and torch's in fp64."""

import threading

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
