"""Paged KV cache: rotated keys, and values, in blocks of a pool, so that sequences of any lengths share
memory and a forward pass may mix single tokens and parts of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.inference_kernels import PagedAttention, PagedBatch
from ascendspeed.models.gpt.attention import attend, attend_with_normalizer, join_attention
from ascendspeed.models.gpt.int8_cache import CacheTensor, allocate, stored_tensors
from ascendspeed.models.gpt.rope import Rope

GATHER_BYTES = 2 << 20
"""Most bytes of keys that are gathered at a time: one gather for all rows maps fresh memory at every layer,
which took 3.8 times as long as the attention itself (32 rows of 2,048 tokens)."""
MIN_COMMON_BLOCKS = 2
"""Least blocks at the beginning of several sequences that are read once for all of them."""


@dataclass(frozen=True)
class SequenceSlice:
    """Consecutive tokens of one sequence in a forward pass."""

    blocks: Sequence[int]
    """Blocks of the sequence in order; they cover at least `first + count` tokens."""
    first: int
    """Position of the first token; the cache holds the tokens before it."""
    count: int
    frequencies: Tensor
    """Inverse rotary frequencies of the sequence, fp32 [d/2]; one object per RoPE base."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.first + self.count


@dataclass(frozen=True)
class _SharedPrefix:
    """Single tokens of several sequences that begin with the same blocks."""

    tokens: Tensor
    """Indices into the pass, [n]."""
    blocks: slice | Tensor
    """The common blocks."""
    groups: "list[_DecodeGroup]"
    """Decoding groups of these tokens, with the blocks that are not common."""


@dataclass(frozen=True)
class _DecodeGroup:
    """Single tokens of several sequences whose keys are gathered together."""

    tokens: Tensor
    """Indices into the pass or, below `_SharedPrefix`, into its tokens; [n]."""
    blocks: Tensor
    """Block table, flattened: [n * most blocks of a row]."""
    mask: Tensor
    """[n, 1, 1, keys]: 0, or -inf beyond the end of a row."""


class PagedKVCache:
    """Keys and values of every layer of this rank, [groups / TP, blocks, block size, d] each, allocated once.

    If a kernel of the device reads the cache, its memory is [blocks, block size, groups / TP, d]. It takes
    the place of `KVCache` in `LanguageModel`. The tokens of a pass are one row of a batch of 1, sequence
    after sequence; `begin_pass` says which tokens of which sequences they are.
    """

    def __init__(self, gpt: GPTModel, num_blocks: int, block_size: int, is_int8: bool = False) -> None:
        """Allocates `num_blocks` blocks of `block_size` tokens, in int8 or in the model's type."""
        config = gpt.config
        self.block_size = block_size
        self.rope: Rope = config.rope
        self._rotate = config.kernels.rotary
        self.device, self.dtype = next(gpt.parameters()).device, config.params_dtype
        self.layers: dict[int, tuple[CacheTensor, CacheTensor]] = {}
        kernel: PagedAttention | None = config.kernels.paged
        fits = kernel and kernel.supports(self.dtype, config.kv_channels, block_size) and not is_int8
        self._kernel = kernel if fits else None
        widest = 1
        for layer in gpt.decoder.layers:
            groups = layer.self_attention.num_query_groups_per_partition
            shape = (groups, num_blocks, block_size, config.kv_channels)
            self.layers[layer.layer_number] = self._allocate(shape, is_int8), self._allocate(shape, is_int8)
            widest = max(widest, groups)
        bytes_per_token = widest * config.kv_channels * self.dtype.itemsize
        self._gather_tokens = max(GATHER_BYTES // bytes_per_token, block_size)

    def _allocate(self, shape: tuple[int, int, int, int], is_int8: bool) -> CacheTensor:
        if self._kernel is None:
            return allocate(shape, self.dtype, self.device, is_int8)
        groups, *blocks, d = shape
        return torch.zeros(*blocks, groups, d, dtype=self.dtype, device=self.device).permute(2, 0, 1, 3)

    @property
    def has_kernel(self) -> bool:
        """True if a kernel of the device reads the cache."""
        return self._kernel is not None

    def begin_prepared_pass(
        self, blocks: Tensor, offsets: Tensor, rotary: tuple[Tensor, Tensor], batch: PagedBatch
    ) -> None:
        """Prepares the next pass for the device's kernel from tensors on the device: block and offset of the
        key of every token, and the tables of `rotary_tables`."""
        self._blocks, self._offsets, self._batch = blocks, offsets, batch
        self._cos, self._sin = rotary

    def begin_pass(self, slices: Sequence[SequenceSlice]) -> None:
        """Prepares the next forward pass, whose tokens are those of `slices`, one after the other."""
        positions, blocks, offsets, starts = [], [], [], []
        total = 0
        for part in slices:
            of_slice = torch.arange(part.first, part.end)
            index = of_slice // self.block_size
            positions.append(of_slice)
            blocks.append(torch.as_tensor(part.blocks)[index])
            offsets.append(of_slice - index * self.block_size)
            starts.append(total)
            total += part.count
        self._blocks = torch.cat(blocks).to(self.device)
        self._offsets = torch.cat(offsets).to(self.device)
        cos, sin = self.rotary_tables(torch.cat(positions), slices)
        self._cos, self._sin = cos.to(self.device), sin.to(self.device)
        if self._kernel is not None:
            used = [part.blocks[: -(-part.end // self.block_size)] for part in slices]
            counts, lengths = [part.count for part in slices], [part.end for part in slices]
            self._batch = PagedBatch.of(counts, lengths, used, self.device)
            return
        decodes = [(start, part) for start, part in zip(starts, slices, strict=True) if _is_decode(part)]
        prefixes, others = self._shared_prefixes(decodes)
        self._prefixes, self._groups = prefixes, self._decode_groups(others)
        self._chunks = [
            (start, part, self._block_index(part.blocks[: -(-part.end // self.block_size)]))
            for start, part in zip(starts, slices, strict=True)
            if not _is_decode(part)
        ]

    def rotary_tables(self, positions: Tensor, slices: Sequence[SequenceSlice]) -> tuple[Tensor, Tensor]:
        """Computes cos and sin [tokens, 1, 1, d] of a pass on the host."""
        if all(part.frequencies is slices[0].frequencies for part in slices):
            frequencies = slices[0].frequencies[None]
        else:
            counts = torch.tensor([part.count for part in slices])
            frequencies = torch.stack([part.frequencies for part in slices]).repeat_interleave(counts, 0)
            frequencies = frequencies[:, None]
        return self.rope.cos_sin(positions[:, None].float(), frequencies, self.dtype)

    def _shared_prefixes(
        self, decodes: Sequence[tuple[int, SequenceSlice]]
    ) -> tuple[list[_SharedPrefix], list[tuple[int, SequenceSlice]]]:
        """Returns the single tokens that share at least `MIN_COMMON_BLOCKS` with others, and the rest."""
        families: dict[int, list[tuple[int, SequenceSlice]]] = {}
        for member in decodes:
            families.setdefault(member[1].blocks[0], []).append(member)
        prefixes, others = [], []
        for members in families.values():
            common = _common_blocks([part for _, part in members], self.block_size)
            if len(members) < 2 or common < MIN_COMMON_BLOCKS:
                others += members
                continue
            skipped = common * self.block_size
            rest = [
                (i, replace(part, blocks=part.blocks[common:], first=part.first - skipped))
                for i, (_, part) in enumerate(members)
            ]
            tokens = torch.tensor([start for start, _ in members], device=self.device)
            blocks = self._block_index(members[0][1].blocks[:common])
            prefixes.append(_SharedPrefix(tokens, blocks, self._decode_groups(rest)))
        return prefixes, others

    def _decode_groups(self, decodes: Sequence[tuple[int, SequenceSlice]]) -> list[_DecodeGroup]:
        """Groups single tokens by the length of their sequences: a gather is small, and little of it is
        masked."""
        groups: list[_DecodeGroup] = []
        members: list[tuple[int, SequenceSlice]] = []
        for member in sorted(decodes, key=lambda item: item[1].end):
            padded = -(-member[1].end // self.block_size) * self.block_size
            if members and (len(members) + 1) * padded > self._gather_tokens:
                groups.append(self._decode_group(members))
                members = []
            members.append(member)
        if members:
            groups.append(self._decode_group(members))
        return groups

    def _decode_group(self, members: Sequence[tuple[int, SequenceSlice]]) -> _DecodeGroup:
        most = -(-members[-1][1].end // self.block_size)
        table = torch.zeros(len(members), most, dtype=torch.long)
        for row, (_, part) in zip(table, members, strict=True):
            used = part.blocks[: -(-part.end // self.block_size)]
            row[: len(used)] = torch.as_tensor(used)
        ends = torch.tensor([part.end for _, part in members])
        visible = torch.arange(most * self.block_size) < ends[:, None]
        mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, float("-inf"))
        return _DecodeGroup(
            torch.tensor([start for start, _ in members], device=self.device),
            table.flatten().to(self.device),
            mask[:, None, None].to(self.device),
        )

    def _block_index(self, blocks: Sequence[int]) -> slice | Tensor:
        """Returns consecutive blocks as a slice, which needs no copy, others as a tensor of indices."""
        if all(block == blocks[0] + i for i, block in enumerate(blocks)):
            return slice(blocks[0], blocks[0] + len(blocks))
        return torch.as_tensor(blocks, device=self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Stores key and value [tokens, 1, groups, d] of this pass and attends: query [tokens, 1, heads, d]
        -> [tokens, 1, heads * d]."""
        keys, values = self.layers[layer]
        query, key = self._rotate(query, self._cos, self._sin), self._rotate(key, self._cos, self._sin)
        keys[:, self._blocks, self._offsets] = key[:, 0].transpose(0, 1)
        values[:, self._blocks, self._offsets] = value[:, 0].transpose(0, 1)
        if self._kernel is not None:
            k, v = (
                tensor.permute(1, 2, 0, 3) for cached in (keys, values) for tensor in stored_tensors(cached)
            )
            return self._kernel(query[:, 0], k, v, self._batch, scale).flatten(1)[:, None]
        out = torch.empty_like(query[:, 0])
        for prefix in self._prefixes:
            out[prefix.tokens] = self._attend_prefix(prefix, query[prefix.tokens, 0], keys, values, scale)
        for group in self._groups:
            q, k, v = self._gather(group, query[group.tokens, 0], keys, values)
            attended = F.scaled_dot_product_attention(q, k, v, group.mask, scale=scale)
            out[group.tokens] = attended.flatten(1, 2)
        for start, part, blocks in self._chunks:
            end = start + part.count
            q = query[start:end, 0].transpose(0, 1)[None]
            k, v = (cached[:, blocks].flatten(1, 2)[None] for cached in (keys, values))
            out[start:end] = attend(q, k, v, part.first, scale=scale)[0].transpose(0, 1)
        return out.flatten(1)[:, None]

    def _attend_prefix(
        self,
        prefix: _SharedPrefix,
        query: Tensor,
        keys: CacheTensor,
        values: CacheTensor,
        scale: float | None,
    ) -> Tensor:
        """Returns the attention output [n, heads, d] of single tokens [n, heads, d] with common blocks, which
        are read once for all of them."""
        k, v = (cached[:, prefix.blocks].flatten(1, 2) for cached in (keys, values))
        out, normalizer = attend_with_normalizer(query.transpose(0, 1), k, v, scale=scale)
        out = out.transpose(0, 1).contiguous()
        for group in prefix.groups:
            q, k, v = self._gather(group, query[group.tokens], keys, values)
            partial, total = attend_with_normalizer(q, k, v, group.mask, scale=scale)
            rows, totals = out[group.tokens], normalizer[:, group.tokens]
            join_attention(rows, totals, partial.flatten(1, 2), total.flatten(1, 2).t())
            out[group.tokens] = rows
        return out.to(query.dtype)

    @staticmethod
    def _gather(
        group: _DecodeGroup, query: Tensor, keys: CacheTensor, values: CacheTensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries [n, groups, heads / groups, d], keys and values [n, groups, m, d] of single tokens
        [n, heads, d]."""
        rows, groups = len(group.tokens), keys.size(0)
        k, v = (
            cached.index_select(1, group.blocks).view(groups, rows, -1, cached.size(-1)).transpose(0, 1)
            for cached in (keys, values)
        )
        # Query heads that share a key take the position of several queries of one head, so that keys need
        # not be copied.
        return query.unflatten(1, (groups, -1)), k, v


def _common_blocks(parts: Sequence[SequenceSlice], block_size: int) -> int:
    """Returns the number of blocks that all sequences begin with; none holds the token of a slice."""
    limit = min(part.first // block_size for part in parts)
    tables = zip(*(part.blocks[:limit] for part in parts), strict=True)
    return next((i for i, blocks in enumerate(tables) if len(set(blocks)) > 1), limit)


def _is_decode(part: SequenceSlice) -> bool:
    return part.count == 1 and part.first > 0
