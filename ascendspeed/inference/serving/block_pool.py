"""Blocks of the paged KV cache: allocation, reference counts, and sharing of equal prefixes."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any


class BlockPool:
    """Allocates blocks and finds the blocks of a prefix again.

    A full block is registered under (id of the registered block before it, its tokens). Keys are compared
    exactly, so no hash can collide; ids are never used twice, so a key never leads to a block that has been
    overwritten. The id before the first block is the root, which must tell apart everything else that keys
    and values depend on: the RoPE base, the adapter, a caller's salt. Blocks that nobody uses stay findable
    until they are needed, oldest first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._unused = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Registered blocks without a user, least recently used first."""
        self._references = [0] * num_blocks
        self._keys: list[tuple[Any, tuple[int, ...]] | None] = [None] * num_blocks
        self._registered: dict[tuple[Any, tuple[int, ...]], tuple[int, int]] = {}
        """Key -> (block, id)."""
        self._last_id = 0

    @property
    def available(self) -> int:
        """Number of blocks that can be allocated."""
        return len(self._unused) + len(self._idle)

    def allocate(self) -> int:
        """Returns a block with one reference; `available` must not be 0."""
        if self._unused:
            block = self._unused.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._registered[self._keys[block]]  # type: ignore[arg-type]
            self._keys[block] = None
        self._references[block] = 1
        return block

    def find_prefix(self, root: Any, tokens: Sequence[int]) -> tuple[list[int], Any]:
        """Returns the registered blocks that hold the beginning of `tokens`, and the id of the last one.

        At least one token is left out: its logits are needed, so it must go through the model.
        """
        blocks: list[int] = []
        parent = root
        for start in range(0, (len(tokens) - 1) // self.block_size * self.block_size, self.block_size):
            entry = self._registered.get((parent, tuple(tokens[start : start + self.block_size])))
            if entry is None:
                break
            block, parent = entry
            blocks.append(block)
        return blocks, parent

    def count_idle(self, blocks: Sequence[int]) -> int:
        """Returns how many of `blocks` are among the available ones."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1

    def register(self, block: int, parent: Any, tokens: Sequence[int]) -> int:
        """Makes a full block findable; returns its id.

        If another block is registered under the same key, this one stays private, and the id is the other's.
        """
        key = (parent, tuple(tokens))
        if key in self._registered:
            return self._registered[key][1]
        self._last_id += 1
        self._registered[key] = (block, self._last_id)
        self._keys[block] = key
        return self._last_id

    def release(self, blocks: Sequence[int]) -> None:
        """Removes a reference from each block of a sequence; its end is reused before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._keys[block] is None:
                    self._unused.append(block)
                else:
                    self._idle[block] = None
