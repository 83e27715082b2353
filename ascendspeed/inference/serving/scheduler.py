"""Continuous batching: chooses the tokens of every forward pass under one budget.

The scheduler is deterministic, so that every rank computes the same plan from the same events.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from ascendspeed.inference.serving.block_pool import BlockPool
from ascendspeed.inference.serving.request import Request


@dataclass(frozen=True)
class ScheduledTokens:
    """Tokens of a request in the next pass: the `count` tokens after those in the cache, and a draft."""

    request: Request
    count: int
    draft: tuple[int, ...] = ()
    """Proposed tokens after the end of the sequence, which the pass checks."""

    @property
    def size(self) -> int:
        """Tokens in the pass."""
        return self.count + len(self.draft)

    @property
    def needs_token(self) -> bool:
        """True if the pass reaches the end of the sequence, so that its next token is chosen."""
        return self.request.cached + self.count == self.request.length


class Scheduler:
    """Queues of requests and the blocks that they use.

    A pass has at most `token_budget` tokens: first one for each running request, then parts of prompts in the
    order of arrival. When blocks run out, the youngest running request is preempted: its blocks are released,
    and its tokens are read again later.
    """

    def __init__(
        self, pool: BlockPool, token_budget: int, max_running: int, share_prefixes: bool, lookup: int = 0
    ) -> None:
        self.pool, self.lookup = pool, lookup
        self.token_budget, self.max_running, self.share_prefixes = token_budget, max_running, share_prefixes
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0
        """Tokens of admitted prompts, and those of them that were in the cache."""

    @property
    def is_idle(self) -> bool:
        """True if no request is left."""
        return not (self.waiting or self.prefilling or self.running)

    def add(self, request: Request) -> None:
        """Queues a request; prompt and output must fit into all blocks together: else it waits for ever."""
        longest = len(request.prompt) + request.params.sampling.max_new_tokens
        assert longest <= self.pool.num_blocks * self.pool.block_size
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Removes a request from its queue and releases its blocks."""
        for queue in (self.waiting, self.prefilling, self.running):
            if request in queue:
                queue.remove(request)
        self.pool.release(request.blocks)
        request.blocks = []

    def schedule(self) -> list[ScheduledTokens]:
        """Returns the tokens of the next pass, single tokens first; [] if there is nothing to do."""
        decodes = self._grow_running()
        plan = [ScheduledTokens(request, 1) for request in decodes]
        budget = self.token_budget - len(plan)
        for request in self.prefilling:
            if budget > 0:
                plan.append(ScheduledTokens(request, min(budget, request.length - request.cached)))
                budget -= plan[-1].count
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) + len(self.prefilling) >= self.max_running:
                break
            if self._must_wait(request):
                continue
            if not self._admit(request):
                break
            plan.append(ScheduledTokens(request, min(budget, request.length - request.cached)))
            budget -= plan[-1].count
        return self._add_drafts(plan, len(decodes), budget) if self.lookup else plan

    def _add_drafts(self, plan: list[ScheduledTokens], decodes: int, budget: int) -> list[ScheduledTokens]:
        """Adds drafts to the first `decodes` items of a plan, as far as budget and spare blocks allow."""
        active = len(self.running) + len(self.prefilling)
        drafted = []
        for item in plan[:decodes]:
            request = item.request
            draft = request.propose(min(self.lookup, budget))
            size = self.pool.block_size
            missing = -(-(request.length + len(draft)) // size) - len(request.blocks)
            if missing > 0 and self.pool.available - missing < active:
                draft = ()
            elif draft:
                request.blocks += [self.pool.allocate() for _ in range(missing)]
            budget -= len(draft)
            drafted.append(ScheduledTokens(request, item.count, draft))
        return drafted + plan[decodes:]

    def complete_pass(self, plan: list[ScheduledTokens]) -> None:
        """Records that the pass is in the cache, and registers the blocks that it filled."""
        for item in plan:
            request = item.request
            at_end = item.needs_token
            request.cached += item.count
            if self.share_prefixes:
                self._register_blocks(request)
            if at_end and request in self.prefilling:
                self.prefilling.remove(request)
                self.running.append(request)

    def _must_wait(self, request: Request) -> bool:
        """True while the prompt that the request shares with another one is being read."""
        if request.follows is None or request.was_admitted or not self.share_prefixes:
            return False
        return any(other.id == request.follows for other in (*self.prefilling, *self.waiting))

    def _admit(self, request: Request) -> bool:
        """Moves a waiting request to the prefilling ones if there are blocks for all its tokens, and one to
        spare for each active request."""
        pool, tokens = self.pool, request.tokens
        shared: list[int] = []
        parent: Any = request.root
        if self.share_prefixes:
            shared, parent = pool.find_prefix(request.root, tokens)
        new_blocks = -(-len(tokens) // pool.block_size) - len(shared)
        active = len(self.running) + len(self.prefilling)
        # Idle blocks of the prefix count as available, but sharing them takes them away.
        if pool.available - pool.count_idle(shared) < new_blocks + active:
            return False
        pool.share(shared)
        request.blocks = shared + [pool.allocate() for _ in range(new_blocks)]
        request.cached, request.registered, request.parent = (
            len(shared) * pool.block_size,
            len(shared),
            parent,
        )
        if not request.was_admitted:
            request.was_admitted, request.shared_tokens = True, request.cached
            self.prefix_queries += len(tokens)
            self.prefix_hits += request.cached
        self.waiting.remove(request)
        self.prefilling.append(request)
        return True

    def _grow_running(self) -> list[Request]:
        """Gives every running request a block for its next token; preempts the youngest ones if there are too
        few. Returns the requests that still run."""
        for request in list(self.running):
            while request in self.running and request.length > len(request.blocks) * self.pool.block_size:
                if self.pool.available:
                    request.blocks.append(self.pool.allocate())
                else:
                    self._preempt(self.prefilling[-1] if self.prefilling else self.running[-1])
        return list(self.running)

    def _preempt(self, request: Request) -> None:
        """Releases a request's blocks and puts it back to the head of the queue."""
        self.remove(request)
        request.cached = request.registered = 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _register_blocks(self, request: Request) -> None:
        """Registers the request's full blocks: those whose tokens are all in the cache."""
        size = self.pool.block_size
        if (request.registered + 1) * size > request.cached:
            return
        tokens = request.tokens
        while (request.registered + 1) * size <= request.cached:
            start = request.registered * size
            block = request.blocks[request.registered]
            request.parent = self.pool.register(block, request.parent, tokens[start : start + size])
            request.registered += 1
