"""KV cache: rotated keys, and values, of earlier tokens, so that a new token costs one token and not the
sequence again."""

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.fused_kernels import rotary
from ascendspeed.models.gpt.attention import attend
from ascendspeed.models.gpt.int8_cache import CacheTensor, allocate, stored_tensors
from ascendspeed.models.gpt.rope import Rope


class KVCache:
    """Keys and values of every layer of this rank, [rows, groups / TP, capacity, d] each, allocated once.

    A row is a sequence, and its slot i holds token i, so that rows may have different lengths. The slots
    beyond a row's length hold arbitrary finite numbers: causal attention never reads a slot before it is
    written. `begin_prefill` or `begin_decode` chooses the slots of the next forward pass.
    """

    def __init__(self, gpt: GPTModel, rows: int, capacity: int, is_int8: bool = False) -> None:
        """Allocates the cache for at most `rows` sequences of `capacity` tokens, in int8 or in the model's
        type."""
        config = gpt.config
        self.capacity = capacity
        self.rows = rows
        self.rope: Rope = config.rope
        self.rotary = config.kernels.rotary
        self.device, self.dtype = next(gpt.parameters()).device, config.params_dtype
        self.layers: dict[int, tuple[CacheTensor, CacheTensor]] = {}
        self._slots: Tensor | None = None
        self._mask: Tensor | None = None
        for layer in gpt.decoder.layers:
            shape = (rows, layer.self_attention.num_query_groups_per_partition, capacity, config.kv_channels)
            key, value = (allocate(shape, self.dtype, self.device, is_int8) for _ in range(2))
            self.layers[layer.layer_number] = key, value
        self.set_rope_lengths([0])

    def set_rope_lengths(self, lengths: Sequence[int]) -> None:
        """Fixes the rotary frequencies of each row by the length of its prompt; a single length applies to
        every row.

        Dynamic NTK has another base for every length beyond the trained one. Keys in the cache are already
        rotated, so a row keeps the base it began with.
        """
        rows = [self.rope.inverse_frequencies(length) for length in lengths]
        equal = all(torch.equal(rows[0], row) for row in rows[1:])
        self._frequencies = torch.stack(rows[:1] if equal else rows).to(self.device)

    def begin_prefill(self, first: int, count: int, rows: int) -> None:
        """The next pass has tokens `first` ... `first + count - 1` of each of the first `rows` rows."""
        self._first, self._slots = first, None
        positions = torch.arange(first, first + count, dtype=torch.float32, device=self.device)
        self._prepare_rotary(positions[:, None], rows)

    def begin_decode(self, slots: Sequence[int]) -> None:
        """The next pass has one token of each row, at the given slots."""
        self._first, self._end = min(slots), max(slots) + 1
        self._slots = torch.tensor(slots, device=self.device)
        self._row, self._mask = torch.arange(len(slots), device=self.device), None
        if self._first + 1 < self._end:  # rows of different lengths
            visible = torch.arange(self._end, device=self.device) <= self._slots[:, None]
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
            self._mask = mask.masked_fill_(~visible, float("-inf"))[:, None, None]
        self._prepare_rotary(self._slots[None].float(), len(slots))

    def _prepare_rotary(self, positions: Tensor, rows: int) -> None:
        """Computes cos and sin of this pass for all layers; positions [s, b or 1]."""
        frequencies = self._frequencies[:rows] if len(self._frequencies) > 1 else self._frequencies
        self._cos, self._sin = self.rope.cos_sin(positions, frequencies, self.dtype)
        # Fused kernels take one table for all rows only.
        self._rotate = self.rotary if self._cos.size(1) == 1 else rotary

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Stores key and value [s, b, groups, d] of this pass and attends: query [s, b, heads, d] -> [s, b,
        heads * d]."""
        (keys, values), (count, rows) = self.layers[layer], query.shape[:2]
        query, key = self._rotate(query, self._cos, self._sin), self._rotate(key, self._cos, self._sin)
        if self._slots is None:
            end = self._first + count
            keys[:rows, :, self._first : end] = key.permute(1, 2, 0, 3)
            values[:rows, :, self._first : end] = value.permute(1, 2, 0, 3)
            k, v = keys[:rows, :, :end], values[:rows, :, :end]
            out = attend(query.permute(1, 2, 0, 3), k, v, self._first, scale=scale, longest=self.capacity)
            return out.permute(2, 0, 1, 3).flatten(2)
        if self._mask is None:
            keys[:rows, :, self._first], values[:rows, :, self._first] = key[0], value[0]
        else:
            keys[self._row, :, self._slots], values[self._row, :, self._slots] = key[0], value[0]
        # Query heads that share a key take the place of several queries of one head, so that keys need not be
        # copied.
        grouped = query[0].unflatten(1, (key.size(2), -1))
        out = F.scaled_dot_product_attention(
            grouped, keys[:rows, :, : self._end], values[:rows, :, : self._end], self._mask, scale=scale
        )
        return out.flatten(1)[None]

    def reorder(self, rows: Sequence[int], used: int) -> None:
        """Row i becomes a copy of row `rows[i]` in its first `used` slots; the number of rows may grow."""
        if len(self._frequencies) > 1:
            self._frequencies = self._frequencies[list(rows)]
        moved = [(i, row) for i, row in enumerate(rows) if i != row]
        if not moved:
            return
        targets, sources = (torch.tensor(side, device=self.device) for side in zip(*moved, strict=True))
        for pair in self.layers.values():
            for cached in pair:
                for tensor in stored_tensors(cached):
                    tensor[targets, :, :used] = tensor[sources, :, :used]
