"""Static tensors of decode passes over the paged cache, which a graph reads at fixed addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ascendspeed.distributed.inference_kernels import PagedBatch
from ascendspeed.models.gpt.paged_kv_cache import PagedKVCache, SequenceSlice

TOKEN, BLOCK, OFFSET, LENGTH, TABLE = range(5)
"""Columns of the numbers of a row: token, block and offset of its key, key length; then its blocks."""


class DecodeBuffers:
    """Inputs of a pass of one token of each of `rows` sequences, or of fewer.

    Rows without a sequence write and read the first key of a block that belongs to none. The tensors keep
    their memory; Python numbers of the pass are upper bounds that never change.
    """

    def __init__(self, cache: PagedKVCache, rows: int, max_blocks: int, scratch_block: int) -> None:
        """`max_blocks`: most blocks of a sequence."""
        self.cache, self.rows, self.scratch_block = cache, rows, scratch_block
        self.numbers = torch.zeros(rows, TABLE + max_blocks, dtype=torch.int32, device=cache.device)
        shape = (rows, 1, 1, cache.rope.model.head_dim)
        self.cos, self.sin = (torch.zeros(shape, dtype=cache.dtype, device=cache.device) for _ in range(2))
        self._cumulative = torch.arange(rows + 1, dtype=torch.int32, device=cache.device)
        self._most_keys = max_blocks * cache.block_size

    def fill(self, tokens: Sequence[int], slices: Sequence[SequenceSlice]) -> None:
        """Writes the tokens of the next pass, one of each slice, and what attention needs of the slices."""
        size, count = self.cache.block_size, len(slices)
        rows = []
        for token, part in zip(tokens, slices, strict=True):
            used = part.blocks[: -(-part.end // size)]
            rows.append([token, used[-1], part.first % size, part.end, *used])
        widest = max(map(len, rows))
        numbers = torch.zeros(self.numbers.shape, dtype=torch.int32)
        numbers[count:, [BLOCK, TABLE]] = self.scratch_block
        numbers[count:, LENGTH] = 1
        numbers[:count, :widest] = torch.tensor(
            [row + [0] * (widest - len(row)) for row in rows], dtype=torch.int32
        )
        self.numbers.copy_(numbers)
        positions = torch.tensor([part.first for part in slices])
        cos, sin = self.cache.rotary_tables(positions, slices)
        self.cos[:count].copy_(cos)
        self.sin[:count].copy_(sin)

    def fill_with_scratch(self) -> None:
        """Writes a pass of other numbers than those of any other one, whose keys are all in the block that
        belongs to no sequence."""
        size, frequencies = self.cache.block_size, self.cache.rope.inverse_frequencies(0)
        # Rows that write the same key have the same token.
        firsts = [row % size for row in range(self.rows)]
        slices = [SequenceSlice([self.scratch_block], first, 1, frequencies) for first in firsts]
        self.fill([1 + first % 8 for first in firsts], slices)

    def begin_pass(self) -> Tensor:
        """Begins a pass of the cache by operations on these tensors alone; returns its tokens [rows]."""
        tokens, blocks, offsets = self.numbers[:, :LENGTH].long().unbind(1)
        batch = PagedBatch(
            ends=list(range(1, self.rows + 1)),
            key_lengths=[self._most_keys] * self.rows,
            cumulative=self._cumulative,
            lengths=self.numbers[:, LENGTH].contiguous(),
            table=self.numbers[:, TABLE:].contiguous(),
            longest=1,
        )
        self.cache.begin_prepared_pass(blocks, offsets, (self.cos, self.sin), batch)
        return tokens
