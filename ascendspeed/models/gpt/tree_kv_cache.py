"""KV cache of a tree of token sequences: a common prefix is computed and kept once, and attention reads it
without copying it for every sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ascendspeed.models import int8
from ascendspeed.models.gpt.attention import attend_with_normalizer, join_attention
from ascendspeed.models.gpt.rope import Rope


@dataclass(eq=False)
class Segment:
    """Consecutive tokens that one or more sequences have in common: a node of the tree.

    A sequence is a path from a root. Segments are numbered in depth-first order, so that the subtree of a
    segment is a range of numbers.
    """

    tokens: Sequence[int]
    first: int
    """Position of the first token."""
    parent: "Segment | None"
    number: int
    """Number in depth-first order."""
    subtree_end: int = -1
    """Number after the last segment of the subtree."""
    scored: list[int] = field(default_factory=list)
    """Ascending indices of the tokens whose final hidden state is needed."""

    @property
    def ancestors(self) -> "list[Segment]":
        """Segments from the parent up to the root."""
        path, segment = [], self.parent
        while segment is not None:
            path.append(segment)
            segment = segment.parent
        return path


@dataclass(frozen=True)
class _Part:
    """Consecutive queries of a pass that attend to the tokens of one segment."""

    queries: slice
    segment: Segment
    keys: slice | None
    """Tokens of the segment in this pass; None: they are in the cache."""
    is_own: bool
    """True for the queries' own segment, False for an ancestor, whose keys are all visible."""
    mask: Tensor | None = None
    """Own segment: [queries, keys], 0, or -inf for a later key; None with `is_causal` False: all visible."""
    is_causal: bool = False
    """Queries and keys are the same tokens."""


class TreeKVCache:
    """Rotated keys, and values, of the segments that later passes attend to, [groups / TP, n, d] for each
    layer.

    It takes the place of `KVCache` in `LanguageModel`. A pass consists of segments with consecutive numbers;
    its tokens are one row of a batch of 1. The last layer attends for the scored tokens only.
    """

    def __init__(self, gpt: GPTModel, rope_length: int, is_int8: bool = False) -> None:
        """`rope_length`: length that fixes the RoPE base of the tree, 0 for the model's own. `is_int8`: round
        keys and values as an int8 cache does; they are stored in the model's type."""
        config = gpt.config
        self.rope: Rope = config.rope
        self._frequencies = self.rope.inverse_frequencies(rope_length)[None]
        self._rotate = config.kernels.rotary
        self._is_int8 = is_int8
        self.device, self.dtype = next(gpt.parameters()).device, config.params_dtype
        self._last_layer = gpt.decoder.layers[-1].layer_number if gpt.post_process else None
        self._stored: dict[Segment, dict[int, tuple[Tensor, Tensor]]] = {}
        """Segment -> layer -> keys and values."""

    def begin_pass(self, segments: Sequence[Segment]) -> None:
        """Prepares the next forward pass, whose tokens are those of `segments`."""
        first, end = segments[0].number, segments[-1].number + 1
        self._stored = {
            segment: layers for segment, layers in self._stored.items() if segment.subtree_end > first
        }
        self._kept: list[tuple[Segment, slice]] = []
        starts, scored_starts, scored = [0], [0], []
        for segment in segments:
            scored += [starts[-1] + i for i in segment.scored]
            starts.append(starts[-1] + len(segment.tokens))
            scored_starts.append(len(scored))
            if segment.subtree_end > end:
                self._kept.append((segment, slice(starts[-2], starts[-1])))
                self._stored[segment] = {}
        self.scored = torch.tensor(scored, dtype=torch.long, device=self.device)
        tokens = [slice(start, end) for start, end in pairwise(starts)]
        queries = [slice(start, end) for start, end in pairwise(scored_starts)]
        self._parts = [
            _Part(own, segment, own, is_own=True, is_causal=True)
            for segment, own in zip(segments, tokens, strict=True)
        ]
        self._parts += _ancestor_parts(segments, tokens, tokens)
        self._scored_parts = [
            self._scored_part(segment, own, scored_tokens)
            for segment, own, scored_tokens in zip(segments, tokens, queries, strict=True)
            if segment.scored
        ]
        self._scored_parts += _ancestor_parts(segments, tokens, queries)
        self._prepare_rotary(segments)

    def _scored_part(self, segment: Segment, tokens: slice, queries: slice) -> _Part:
        """Returns the attention of a segment's scored tokens to the segment."""
        last = segment.scored[-1] + 1
        mask = None
        if len(segment.scored) > 1:
            visible = torch.arange(last) <= torch.tensor(segment.scored)[:, None]
            mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, float("-inf"))
            mask = mask.to(self.device)
        return _Part(queries, segment, slice(tokens.start, tokens.start + last), is_own=True, mask=mask)

    def _prepare_rotary(self, segments: Sequence[Segment]) -> None:
        """Computes cos and sin [tokens, 1, 1, d] of this pass for all layers."""
        positions = [torch.arange(s.first, s.first + len(s.tokens)) for s in segments]
        positions = torch.cat(positions)[:, None].float()
        cos, sin = self.rope.cos_sin(positions, self._frequencies, self.dtype)
        self._cos, self._sin = cos.to(self.device), sin.to(self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attends over this pass and the cache, and stores what later passes need: query [tokens, 1, heads,
        d], key and value [tokens, 1, groups, d] -> [tokens, 1, heads * d]; in the last layer of the model
        those of the scored tokens."""
        parts, cos, sin = self._parts, self._cos, self._sin
        key = self._rotate(key, cos, sin)
        if self._is_int8:
            key, value = (int8.dequantize(*int8.quantize(x, x.dtype)) for x in (key, value))
        if layer == self._last_layer:
            parts, query, cos, sin = (
                self._scored_parts,
                query[self.scored],
                cos[self.scored],
                sin[self.scored],
            )
        q, k, v = (x[:, 0].transpose(0, 1) for x in (self._rotate(query, cos, sin), key, value))
        for segment, tokens in self._kept:
            self._stored[segment][layer] = k[:, tokens].clone(), v[:, tokens].clone()
        out = torch.empty(*query[:, 0].shape, dtype=torch.float32, device=q.device)
        normalizer = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for part in parts:
            if part.keys is None:
                keys, values = self._stored[part.segment][layer]
            else:
                keys, values = k[:, part.keys], v[:, part.keys]
            queries = q[:, part.queries]
            partial, total = attend_with_normalizer(queries, keys, values, part.mask, part.is_causal, scale)
            if part.is_own:
                out[part.queries], normalizer[:, part.queries] = partial.transpose(0, 1), total
            else:
                join_attention(out[part.queries], normalizer[:, part.queries], partial.transpose(0, 1), total)
        return out.to(query.dtype).flatten(1)[:, None]


def _ancestor_parts(
    segments: Sequence[Segment], tokens: Sequence[slice], queries: Sequence[slice]
) -> list[_Part]:
    """Returns the attention of the queries of a pass to the segments above their own.

    `tokens`, `queries`: ranges of each segment's tokens and queries in the pass.
    """
    parts = []
    first = segments[0].number
    in_pass = [segment for segment in segments[:-1] if segment.subtree_end > segment.number + 1]
    for ancestor in [*segments[0].ancestors, *in_pass]:
        begin = max(ancestor.number + 1 - first, 0)
        end = min(ancestor.subtree_end - first, len(segments))
        below = slice(queries[begin].start, queries[end - 1].stop)
        if below.start < below.stop:
            keys = tokens[ancestor.number - first] if ancestor.number >= first else None
            parts.append(_Part(below, ancestor, keys, is_own=False))
    return parts
