"""Tree of the common prefixes of token sequences, and its division into forward passes."""

from collections.abc import Iterator, Sequence

from ascendspeed.models.gpt.tree_kv_cache import Segment

Tokens = Sequence[int]

MIN_SHARED_TOKENS = 16
"""Least tokens that a segment of its own must save: its attention takes a call more in every layer."""


class PrefixTree:
    """Different sequences, sorted by their tokens, as paths of a tree of segments.

    `segments` are in depth-first order and have at most `max_segment` tokens.
    """

    def __init__(self, rows: Sequence[Tokens], max_segment: int) -> None:
        self.segments: list[Segment] = []
        self._max_segment = max_segment
        self._last: list[Segment] = []
        """Last segment of every row."""
        pending: list[tuple[int, int, int, Segment | None]] = [(0, len(rows), 0, None)]
        while pending:  # depth first; each entry: rows `begin` to `end` below `parent`, from a position on
            begin, end, position, parent = pending.pop()
            pending += reversed(self._grow(rows, begin, end, position, parent))
        for segment in reversed(self.segments):  # children have higher numbers than their parents
            segment.subtree_end = max(segment.subtree_end, segment.number + 1)
            if segment.parent is not None:
                segment.parent.subtree_end = max(segment.parent.subtree_end, segment.subtree_end)

    def locate(self, row: int, position: int) -> tuple[Segment, int]:
        """Returns the segment of a token of a row, and its index in the segment."""
        segment = self._last[row]
        while segment.first > position:
            segment = segment.parent
        return segment, position - segment.first

    def _grow(
        self, rows: Sequence[Tokens], begin: int, end: int, position: int, parent: Segment | None
    ) -> list[tuple[int, int, int, Segment | None]]:
        """Adds the segments that rows `begin` to `end` have in common; returns the groups of rows below."""
        row = rows[begin]
        if end - begin == 1:
            self._last.append(self._add(row, position, len(row), parent))
            return []
        common = _common_end(row, rows[end - 1], position)
        if (common - position) * (end - begin - 1) >= MIN_SHARED_TOKENS:
            parent, position = self._add(row, position, common, parent), common
        groups = []
        if len(row) == common:  # the row ends where the others go on
            if position == common and parent is not None:
                self._last.append(parent)
            else:
                groups.append((begin, begin + 1, position, parent))
            begin += 1
        start = begin
        for i in range(begin + 1, end + 1):
            if i == end or rows[i][common] != rows[start][common]:
                groups.append((start, i, position, parent))
                start = i
        return groups

    def _add(self, row: Tokens, start: int, end: int, parent: Segment | None) -> Segment:
        """Adds tokens `start` to `end` of a row as one segment or, if it is too long, as several."""
        for first in range(start, end, self._max_segment):
            tokens = row[first : min(first + self._max_segment, end)]
            parent = Segment(tokens, first, parent, len(self.segments))
            self.segments.append(parent)
        assert parent is not None, "a row has at least one token"
        return parent


def _common_end(a: Tokens, b: Tokens, start: int) -> int:
    """Returns the position after the last token of the common prefix, which is known up to `start`."""
    shortest = min(len(a), len(b))
    return next((i for i in range(start, shortest) if a[i] != b[i]), shortest)


def passes(segments: Sequence[Segment], token_budget: int) -> Iterator[list[Segment]]:
    """Yields consecutive segments with at most `token_budget` tokens together; a longer one alone."""
    batch: list[Segment] = []
    size = 0
    for segment in segments:
        if batch and size + len(segment.tokens) > token_budget:
            yield batch
            batch, size = [], 0
        batch.append(segment)
        size += len(segment.tokens)
    if batch:
        yield batch
