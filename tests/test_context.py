"""Context parallel in one process: positions of a rank, and attention of chunks that follow other keys."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH, HEADS, GROUPS, D = 24, 4, 2, 8


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_has_an_early_and_a_late_chunk(cpu, size):
    """Chunks are those of megatron-core's own `get_batch_on_this_cp_rank` and of TransformerEngine."""
    from ascendspeed.models.gpt.sequence_shard import SequenceShard

    whole, seen = torch.arange(LENGTH), []
    for rank in range(size):
        share = SequenceShard(rank, size)
        local, chunk = share.take(whole, 0), LENGTH // (2 * size)
        seen.append(local)
        if size == 1:
            assert local.equal(whole)
            assert share.chunk_starts(LENGTH) == [0]
            continue
        first, last = rank * chunk, (2 * size - 1 - rank) * chunk
        assert local.tolist() == [*range(first, first + chunk), *range(last, last + chunk)]
        assert share.chunk_starts(LENGTH) == [first, last]
    assert torch.cat(seen).sort().values.equal(whole)


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_gathered_is_in_its_own_order(cpu, size, monkeypatch):
    from ascendspeed.models.gpt import context_parallel
    from ascendspeed.models.gpt.sequence_shard import SequenceShard

    whole = torch.randn(LENGTH, 2, 5)
    shares = [SequenceShard(rank, size).take(whole, 0) for rank in range(size)]
    monkeypatch.setattr(
        context_parallel, "gather_from_sequence_parallel_region", lambda x, group: torch.cat(shares)
    )
    assert context_parallel.gather_sequence(shares[0], SimpleNamespace(size=lambda: size)).equal(whole)


@pytest.mark.parametrize("size", [2, 3])
def test_positions_are_exchanged_for_heads_and_back(cpu, size, monkeypatch):
    """Every rank gets all positions, in order, of its own heads; the way back restores its positions."""
    from ascendspeed.models.gpt import context_parallel
    from ascendspeed.models.gpt.sequence_shard import SequenceShard

    whole = torch.randn(LENGTH, 2, 6, 5)
    group = SimpleNamespace(size=lambda: size)
    shares = [SequenceShard(rank, size).take(whole, 0) for rank in range(size)]
    for_rank: list[list[torch.Tensor]] = [[] for _ in range(size)]

    def keep(_, parts):  # the first pass: collects what every rank sends
        for receiver, part in enumerate(parts.chunk(size)):
            for_rank[receiver].append(part)
        return parts

    def exchange(call):
        outputs = []
        for sender in range(size):
            monkeypatch.setattr(context_parallel, "all_to_all", keep)
            call(sender)
        received = [torch.cat(parts) for parts in for_rank]
        for parts in for_rank:
            parts.clear()
        for receiver in range(size):
            monkeypatch.setattr(context_parallel, "all_to_all", lambda _, x, r=receiver: received[r])
            outputs.append(call(receiver))
        return outputs

    heads = exchange(lambda rank: context_parallel.sequence_to_heads(shares[rank], group))
    assert all(own.equal(expected) for own, expected in zip(heads, whole.chunk(size, 2), strict=True))
    back = exchange(lambda rank: context_parallel.heads_to_sequence(heads[rank], group))
    assert all(own.equal(share) for own, share in zip(back, shares, strict=True))


def tensors(length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, HEADS, length, D), (2, GROUPS, length, D), (2, GROUPS, length, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v with every score in sight."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(
        torch.ones(q.size(2), k.size(2)).triu(1).bool(), float("-inf")
    )
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "length", [24, 300, 640]
)  # blocks of 128 queries: less than one, and no whole number of them
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_chunks_of_all_ranks_make_the_whole(cpu, size, length):
    """Outputs and gradients, grouped queries included."""
    from ascendspeed.models.gpt.attention import attend
    from ascendspeed.models.gpt.sequence_shard import SequenceShard

    length -= length % (2 * size)
    inputs = tensors(length)
    expected = by_hand(*inputs)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    q, k, v = inputs
    total = 0
    for rank in range(size):
        share = SequenceShard(rank, size)
        chunks = share.take(q, 2).chunk(len(share.chunk_starts(length)), 2)
        out = torch.cat(
            [
                attend(chunk, k, v, first)
                for chunk, first in zip(chunks, share.chunk_starts(length), strict=True)
            ],
            2,
        )
        assert (out - share.take(expected, 2)).abs().max() < 1e-12
        total = total + (out * share.take(weight, 2)).sum()
    for actual, expected_gradient in zip(torch.autograd.grad(total, inputs), gradients, strict=True):
        assert (actual - expected_gradient).abs().max() < 1e-11
    if size > 1:  # control: chunks at other places than their own
        assert (
            attend(chunks[1], k, v, share.chunk_starts(length)[0])
            - share.take(expected, 2)[:, :, length // (2 * size) :]
        ).abs().max() > 0.1


def test_a_prompt_that_is_read_in_parts_has_one_mask(cpu):
    """The mask of earlier parts is freed, the last one is little larger than its keys, and inference leaves
    none that autograd refuses."""
    from ascendspeed.models.gpt import attention

    attention.clear_mask_cache()
    q, k, v = tensors(1000)
    expected = by_hand(q, k, v)
    with torch.inference_mode():
        for first in range(0, 1000, 40):
            part = slice(first, first + 40)
            out = attention.attend(q[:, :, part], k[:, :, : part.stop], v[:, :, : part.stop], first)
            assert (out - expected[:, :, part]).abs().max() < 1e-12
            assert len(attention._masks) == (first > 0)
    (mask,) = attention._masks.values()
    assert 1000 <= mask.size(1) < 1000 * 9 / 8
    attention.attend(q[:, :, 900:], k, v, 900).sum().backward()


def test_dropped_probabilities_are_those_of_the_chunk(cpu):
    """With v the identity, outputs are probabilities: each is 0 or 1 / (1 - p) times its value; causal."""
    from ascendspeed.models.gpt.attention import attend

    q, k, _ = tensors(192)
    v = torch.eye(192, dtype=torch.float64).expand(2, GROUPS, 192, 192)
    expected = F.softmax(
        (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / D**0.5).masked_fill(
            torch.ones(192, 192).triu(1).bool(), float("-inf")
        ),
        -1,
    )[:, :, 48:]
    torch.manual_seed(0)
    dropped = attend(q[:, :, 48:], k, v, 48, dropout=0.25)
    nonzero = dropped != 0
    assert torch.allclose(dropped[nonzero], (expected / 0.75)[nonzero], rtol=1e-5)
    assert not dropped[expected == 0].any()
    assert nonzero.sum() / (expected != 0).sum() == pytest.approx(0.75, abs=0.01)


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_grows_with_the_length_not_with_its_square(cpu, dropout):
    """Neither in the forward pass nor in the saved tensors, counted once for all views of a tensor."""
    from ascendspeed.models.gpt.attention import attend

    def cost(length: int) -> tuple[int, int]:
        q, k, v = (x.detach().float().requires_grad_() for x in tensors(length))
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with Largest() as watch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attend(q[:, :, length // 2 :], k, v, length // 2, dropout).sum().backward()
        return watch.size, sum(saved.values())

    (largest, saved), (twice, kept_twice) = cost(2048), cost(4096)
    assert twice < 2.2 * largest
    assert twice < HEADS * 2048 * 4096 / 4
    assert kept_twice < 2.2 * saved


def test_rope_has_the_positions_of_the_share(cpu):
    """Dynamic scaling goes by the whole length, not by this rank's part."""
    from dataclasses import replace

    from helpers.models import INTERNLM

    from ascendspeed.models.gpt.rope import Rope
    from ascendspeed.models.gpt.sequence_shard import SequenceShard

    rope = Rope(
        replace(INTERNLM, rope_scaling_type="dynamic", rope_scaling_factor=2.0, max_position_embeddings=32)
    )
    where = (torch.float32, torch.device("cpu"))
    whole = rope.tables(64, *where)
    for rank in range(2):
        share = SequenceShard(rank, 2)
        for local, full in zip(rope.tables(64, *where, share), whole, strict=True):
            assert local.equal(share.take(full, 0))
    assert not rope.tables(64, *where)[0][:32].equal(rope.tables(32, *where)[0])
