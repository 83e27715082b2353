"""Causal core attention by torch's SDPA: grouped queries, rotary embedding, and no s x s scores or masks,
even with dropout."""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ascendspeed.distributed import fp32_products, sdpa_backend
from ascendspeed.models.gpt.context_parallel import gather_sequence, heads_to_sequence, sequence_to_heads
from ascendspeed.models.gpt.packed_sequences import PackedSequences
from ascendspeed.models.gpt.sequence_shard import WHOLE_SEQUENCE, SequenceShard

BLOCK = 128
"""Queries whose scores or mask exist at the same time."""


class RotaryAttention(MegatronModule):
    """Replacement for megatron-core's DotProductAttention that also rotates q and k.

    Rotating here, not in megatron-core's SelfAttention, computes cos and sin once per length instead of twice
    per layer, and allows a device's fused rotary kernel.
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
        self.group = pg_collection.cp
        self.share = SequenceShard(self.group.rank(), self.group.size())
        self.exchanges_heads = self.share.size > 1 and cp_comm_type == "a2a"
        self.packed_attention: Any = None
        """Operation for packed sequences in a compiled layer (`compiled_layers.packed_attention`)."""

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
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]. Causal; s is this
        rank's share.

        `packed_seq_params`: the batch's `PackedSequences`; None if every row is one document.
        """
        if (
            attention_mask is not None
            or attention_bias is not None
            or not isinstance(packed_seq_params, PackedSequences | None)
        ):
            raise NotImplementedError("only causal attention, of whole rows or within `PackedSequences`")
        packed = packed_seq_params
        query, key = self._rotate(query, key, packed)
        if self.exchanges_heads:
            query, key, value = (sequence_to_heads(x, self.group) for x in (query, key, value))
            out = self._attend(query, key, value, packed, WHOLE_SEQUENCE)
            return heads_to_sequence(out, self.group).flatten(2)
        if self.share.size > 1:
            key, value = gather_sequence(key, self.group), gather_sequence(value, self.group)
        return self._attend(query, key, value, packed, self.share).flatten(2)

    def _rotate(self, query: Tensor, key: Tensor, packed: PackedSequences | None) -> tuple[Tensor, Tensor]:
        """Applies the rotary embedding of this rank's positions to query and key [s, b, heads, d]."""
        rope, length = self.config.rope, query.size(0) * self.share.size
        if packed is None:
            cos, sin = rope.tables(length, query.dtype, query.device, self.share)
        else:
            cos, sin = packed.cos_sin(rope, query.dtype, query.device, self.share)
        rotate = self.config.kernels.rotary
        return rotate(query, cos, sin), rotate(key, cos, sin)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None, share: SequenceShard
    ) -> Tensor:
        """Causal attention of the queries in `share`, [s / n, b, heads, d], to all keys and values [s, b,
        groups, d] -> [s / n, b, heads, d]."""
        wide, dtype = self.config.kernels.attention_dtype, query.dtype
        if wide is None:
            return self._attend_as_given(query, key, value, packed, share)
        with fp32_products.saving(dtype):
            query, key, value = (x.to(wide) for x in (query, key, value))
            return self._attend_as_given(query, key, value, packed, share).to(dtype)

    def _attend_as_given(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None, share: SequenceShard
    ) -> Tensor:
        """`_attend` in the number format of its operands."""
        dropout = self.dropout if self.training else 0.0
        if packed is not None and torch.compiler.is_compiling():
            return self.packed_attention(query, key, value, packed.positions, self.scale)
        if packed is not None and share.size == 1 and self._can_use_varlen_kernel(query, dropout):
            q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
            out = self.config.kernels.varlen(q, k, v, packed.bounds(q.device))
            return out.unflatten(0, (-1, len(query))).transpose(0, 1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # Ranks hold different heads and draw different masks. Under sequence parallel megatron-core's block
        # has already forked the random state, and a second fork would make a recomputed pass draw other masks
        # than the first.
        with (
            get_cuda_rng_tracker().fork() if dropout and not self.config.sequence_parallel else nullcontext(),
            sdpa_backend.context(self.config.kernels.sdpa_backend),
        ):
            if packed is None:
                firsts = share.chunk_starts(len(key))
                chunks = zip(q.chunk(len(firsts), 2), firsts, strict=True)
                out = [attend(chunk, k, v, first, dropout, self.scale) for chunk, first in chunks]
            else:
                out = [attend_packed(packed, q, k, v, share, dropout, self.scale)]
        return (out[0] if len(out) == 1 else torch.cat(out, 2)).permute(2, 0, 1, 3)

    def _can_use_varlen_kernel(self, query: Tensor, dropout: float) -> bool:
        """True if the device's kernel for sequences of different lengths supports this call."""
        fits = (
            query.dtype in (torch.bfloat16, torch.float16)
            and query.size(-1) % 8 == 0
            and query.size(-1) <= 256
        )
        return self.config.kernels.varlen is not None and fits and not dropout and self.scale is None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int = 0,
    dropout: float = 0.0,
    scale: float | None = None,
    longest: int = 0,
) -> Tensor:
    """Causal attention of queries at positions from `first`: q [b, heads, n, d], k and v [b, groups, m, d], m
    >= first + n.

    torch's SDPA supports queries that begin later than the keys only by a mask of n x m, and on a CPU it
    makes scores of n x m for dropout. Queries are therefore processed in blocks, and nothing is larger than
    BLOCK x m. `longest`: the largest m of several calls, which then share one mask.
    """
    mask_size = longest or k.size(2)  # of all keys, so that every call shares one mask
    k, v = k[:, :, : first + q.size(2)], v[:, :, : first + q.size(2)]
    grouped = q.size(1) != k.size(1)
    if not dropout and not first:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    future = _future_mask(mask_size, q.dtype, q.device)
    if dropout:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        scale = q.size(-1) ** -0.5 if scale is None else scale
    blocks = []
    for i in range(0, q.size(2), BLOCK):
        end = first + min(i + BLOCK, q.size(2))
        block, keys, values = q[:, :, i : i + BLOCK], k[:, :, :end], v[:, :, :end]
        mask = future[-(end - first - i) :, -end:]
        if dropout:  # the backward pass recomputes the scores, so that they need not be kept
            blocks.append(
                checkpoint(_attend_block, block, keys, values, mask, dropout, scale, use_reentrant=False)
            )
        else:
            blocks.append(
                F.scaled_dot_product_attention(block, keys, values, mask, scale=scale, enable_gqa=grouped)
            )
    return torch.cat(blocks, 2)


def attend_packed(
    packed: PackedSequences,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    share: SequenceShard = WHOLE_SEQUENCE,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Causal attention within each packed sequence, one after the other.

    q [b, heads, n, d] has the positions in `share`, k and v [b, groups, s, d] have all positions.
    """
    rows = []
    # Split, not sliced: the gradient of a slice is as large as all rows, for every sequence.
    for row, (lengths, *qkv) in enumerate(
        zip(packed.lengths, q.split(1), k.split(1), v.split(1), strict=True)
    ):
        blocks = packed.query_blocks(row, share)
        sizes = [block.length for block in blocks], lengths, lengths
        queries, keys, values = (x.split(size, 2) for x, size in zip(qkv, sizes, strict=True))
        out = [
            attend(
                query,
                keys[block.sequence],
                values[block.sequence],
                block.first,
                dropout,
                scale,
                packed.longest,
            )
            for query, block in zip(queries, blocks, strict=True)
        ]
        rows.append(torch.cat(out, 2))
    return torch.cat(rows)


def attend_with_normalizer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its logarithm of the sum of exponentials, with which attention over parts of the keys is
    joined: q [..., heads, n, d], k and v [..., groups, m, d] -> [..., heads, n, d], [..., heads, n], both
    fp32; at most one dimension before the heads.

    `mask` [..., n, m] is added to the scores. `is_causal`: queries and keys have the same positions.
    """
    if q.device.type == "cpu":
        # torch's SDPA drops the sums that its kernel returns.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if q.dim() == 4:
            out, total = kernel(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
            return out.float(), total.float()
        bias = None if mask is None else mask[None, None]
        out, total = kernel(q[None], k[None], v[None], 0.0, is_causal, attn_mask=bias, scale=scale)
        return out[0].float(), total[0].float()
    return attend_by_scores(q, k, v, mask, is_causal, scale)


def attend_by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_with_normalizer` in plain torch, for every device; the scores of 2 x BLOCK queries exist at a
    time."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.size(-3) // x.size(-3), -3) for x in (k, v))
    if is_causal:
        mask = torch.full((q.size(-2), k.size(-2)), float("-inf"), device=q.device).triu(1)
    outs, totals = [], []
    for start in range(0, q.size(-2), 2 * BLOCK):
        rows = slice(start, start + 2 * BLOCK)
        scores = (q[..., rows, :] @ k.transpose(-1, -2)).float() * scale
        if mask is not None:
            scores += mask[..., rows, :]
        total = scores.logsumexp(-1)
        outs.append((scores - total[..., None]).exp().to(q.dtype) @ v)
        totals.append(total)
    return torch.cat(outs, -2).float(), torch.cat(totals, -1)


def join_attention(out: Tensor, normalizer: Tensor, partial: Tensor, total: Tensor) -> None:
    """Adds attention over further keys in place: out, partial [n, heads, d]; logarithms of the sums of
    exponentials normalizer, total [heads, n], all fp32."""
    out.lerp_(partial, torch.sigmoid(total - normalizer).t()[..., None])
    normalizer.copy_(torch.logaddexp(normalizer, total))


_masks: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _future_mask(keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Causal mask [BLOCK, at least `keys`] of the last BLOCK queries: 0, or -inf for a key that is later than
    the query.

    Its last rows and columns serve fewer queries and fewer keys. All blocks and layers use views of one
    tensor, so the backward pass keeps it once. It grows by an eighth at least, for prompts that are read in
    parts.
    """
    key = (dtype, device)
    if key not in _masks or _masks[key].size(1) < keys:
        smaller = _masks.pop(key).size(1) if key in _masks else 0  # freed before the new one exists
        size = max(keys, smaller * 9 // 8)
        with torch.inference_mode(False):  # autograd may save it in a later call
            mask = torch.full((BLOCK, size), float("-inf"), dtype=dtype, device=device)
            _masks[key] = mask.triu_(size - BLOCK + 1)
    return _masks[key]


def clear_mask_cache() -> None:
    """Frees the causal masks that are cached between calls; for long texts they are large."""
    _masks.clear()


def _attend_block(q: Tensor, k: Tensor, v: Tensor, future: Tensor, dropout: float, scale: float) -> Tensor:
    """Attention with dropout of the last n of m positions: q [b, heads, n, d], k and v [b, heads, m, d],
    future [n, m]."""
    scores = q @ k.transpose(-1, -2) * scale + future
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v
