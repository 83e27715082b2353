"""Keys and values of the tokens that a model has seen: a new token costs one token, not the sequence again."""

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.fused_kernels import rotary
from ascendspeed.models.gpt.attention import attend
from ascendspeed.models.gpt.rope import Rope


class KVCache:
    """Rotated keys, and values, of every layer that this rank has: [rows, groups / TP, capacity, d] each, allocated once.

    A row is a sequence and its slot i holds token i, so rows of any lengths lie side by side. Beyond a row's length there may be
    any finite numbers: they are written before they are seen, as no token sees a later one. Before each forward pass `chunk` or
    `step` says which slots it fills.
    """

    def __init__(self, gpt: GPTModel, rows: int, capacity: int) -> None:
        """For at most `rows` sequences of `capacity` tokens."""
        config, self.capacity, self.rows = gpt.config, capacity, rows
        self.rope: Rope = config.rope
        self.rotary = config.kernels.rotary
        parameter = next(gpt.parameters())
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in gpt.decoder.layers:
            shape = (rows, layer.self_attention.num_query_groups_per_partition, capacity, config.kv_channels)
            # Zeros: what a row masks is multiplied by 0 all the same, and must not be NaN.
            key, value = (
                torch.zeros(shape, dtype=parameter.dtype, device=parameter.device) for _ in range(2)
            )
            self.layers[layer.layer_number] = key, value
        self.device, self.dtype = parameter.device, parameter.dtype
        self.set_rope_lengths([0])

    def set_rope_lengths(self, lengths: Sequence[int]) -> None:
        """Fixes each row's rope by the length of its prompt; one length: that of every row.

        Dynamic NTK has another base for every length beyond the trained one. Keys that were rotated stay as they are, so a row
        keeps the base that it began with.
        """
        rows = [self.rope.inverse_frequencies(length) for length in lengths]
        same = all(torch.equal(rows[0], row) for row in rows[1:])
        self._frequencies = torch.stack(rows[:1] if same else rows).to(self.device)

    def begin_prefill(self, first: int, count: int, rows: int) -> None:
        """The next pass takes tokens `first` ... `first + count - 1` of each of the first `rows` rows."""
        self._first, self._slots = first, None
        self._turn(torch.arange(first, first + count, dtype=torch.float32, device=self.device)[:, None], rows)

    def begin_decode(self, slots: Sequence[int]) -> None:
        """The next pass takes one token of each row, that of its slot."""
        self._first, self._end = min(slots), max(slots) + 1
        self._slots = torch.tensor(slots, device=self.device)
        self._row, self._mask = torch.arange(len(slots), device=self.device), None
        if self._first + 1 < self._end:
            seen = torch.arange(self._end, device=self.device) <= self._slots[:, None]
            self._mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(
                ~seen, float("-inf")
            )[:, None, None]
        self._turn(self._slots[None].float(), len(slots))

    def _turn(self, positions: Tensor, rows: int) -> None:
        """Once for all layers: what this pass's queries and keys are turned by."""
        frequencies = self._frequencies[:rows] if len(self._frequencies) > 1 else self._frequencies
        self._cos, self._sin = self.rope.cos_sin(positions, frequencies, self.dtype)
        self._rotate = self.rotary if self._cos.size(1) == 1 else rotary  # the devices' kernels know no rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] of this pass -> [s, b, heads * d]; they stay in the cache."""
        (keys, values), (count, rows) = self.layers[layer], query.shape[:2]
        query, key = self._rotate(query, self._cos, self._sin), self._rotate(key, self._cos, self._sin)
        if self._slots is None:
            end = self._first + count
            keys[:rows, :, self._first : end], values[:rows, :, self._first : end] = (
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
            )
            out = attend(query.permute(1, 2, 0, 3), keys[:rows], values[:rows], self._first, scale=scale)
            return out.permute(2, 0, 1, 3).flatten(2)
        if self._mask is None:
            keys[:rows, :, self._first], values[:rows, :, self._first] = key[0], value[0]
        else:
            keys[self._row, :, self._slots], values[self._row, :, self._slots] = key[0], value[0]
        # The query heads that share a key stand where queries of one head would: no copy of the keys is made for them.
        grouped = query[0].unflatten(1, (key.size(2), -1))
        out = F.scaled_dot_product_attention(
            grouped, keys[:rows, :, : self._end], values[:rows, :, : self._end], self._mask, scale=scale
        )
        return out.flatten(1)[None]

    def reorder(self, rows: Sequence[int], used: int) -> None:
        """Row i becomes what row `rows[i]` was, in its first `used` slots; there may be more rows than before."""
        if len(self._frequencies) > 1:
            self._frequencies = self._frequencies[list(rows)]
        moved = [(i, row) for i, row in enumerate(rows) if i != row]
        if not moved:
            return
        to, of = (torch.tensor(side, device=self.device) for side in zip(*moved, strict=True))
        for pair in self.layers.values():
            for kept in pair:
                kept[to, :, :used] = kept[of, :, :used]
