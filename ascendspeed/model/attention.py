"""Core attention by torch's SDPA: grouped queries, rotary embedding, never s x s scores - with dropout neither."""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCK = 128  # queries whose scores exist at the same time when there is dropout


class RotaryAttention(MegatronModule):
    """Drop-in for megatron-core's DotProductAttention that also rotates q and k.

    Rotating here rather than in megatron-core's SelfAttention computes cos and sin once per length instead of twice per layer,
    and is where a device's fused rotary kernel fits.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale  # None: 1 / sqrt(d)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]. Always causal."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("only plain causal attention; packed sequences would enter here, by segments")
        cos, sin = self.config.rope.tables(query.size(0), query.dtype, query.device)
        rotate = self.config.kernels.rotary
        q, k, v = (x.permute(1, 2, 0, 3) for x in (rotate(query, cos, sin), rotate(key, cos, sin), value))
        if self.dropout and self.training:
            # Ranks hold different heads: different masks. Under sequence parallel the block has already changed to them, and a
            # second change would make a recomputed pass draw others than the first.
            with nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork():
                out = attend_with_dropout(q, k, v, self.dropout, self.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1))
        return out.permute(2, 0, 1, 3).flatten(2)


def attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float | None = None) -> Tensor:
    """Causal attention with dropout on the probabilities; q [b, heads, s, d], k and v [b, groups, s, d].

    torch's SDPA falls back to full s x s scores when it must drop (on a CPU), so queries go block by block and each block's scores
    are computed again in the backward pass instead of kept: memory is BLOCK x s.
    """
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scale = q.size(-1) ** -0.5 if scale is None else scale
    blocks = [
        checkpoint(
            _attend_block, q[:, :, i : i + BLOCK], k[:, :, : i + BLOCK], v[:, :, : i + BLOCK], dropout, scale, use_reentrant=False
        )
        for i in range(0, q.size(2), BLOCK)
    ]
    return torch.cat(blocks, 2)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
    """The last queries of a prefix of keys: q [b, heads, n, d], k and v [b, heads, m, d], n <= m."""
    n, m = q.size(2), k.size(2)
    future = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(future, float("-inf"))
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v
