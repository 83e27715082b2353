"""Models of packed rows, and attention within documents by plain matrix products."""

from dataclasses import replace

import torch

from helpers.engines import RUN as BASE

INTERNLM = replace(  # documents are shorter and longer than what it was trained on; a base each where longer
    BASE.model, max_position_embeddings=16, rope_scaling_type="dynamic", rope_scaling_factor=1.0
)
GROUPED = replace(
    INTERNLM,
    family="internlm2",
    num_query_groups=2,
    add_qkv_bias=False,
    add_dense_bias=False,
    rope_scaling_factor=2.0,
)


def positions(*rows: list[int]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Softmax over past scores in the same document: q, k, v [b, heads, s, d], ids [b, s]."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    seen = (ids[:, :, None] == ids[:, None]) & torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def flat_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Reference for the devices' kernels: q [tokens, heads, d], k and v [tokens, groups, d]."""
    ids = torch.arange(len(ends)).repeat_interleave(torch.tensor(ends).diff(prepend=torch.tensor([0])))
    return dense(*(x.transpose(0, 1)[None] for x in (q, k, v)), ids[None])[0].transpose(0, 1)
