"""Engine of continuous batching: one forward pass per step over the tokens that the scheduler chose.

Every rank runs the same engine on the same events; one rank samples and broadcasts the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendspeed.inference.engine.language_model import LanguageModel
from ascendspeed.inference.serving import batch_sampler
from ascendspeed.inference.serving.block_pool import BlockPool
from ascendspeed.inference.serving.request import Events, Request, Submission, TokenChoice
from ascendspeed.inference.serving.scheduler import ScheduledTokens, Scheduler
from ascendspeed.models.gpt.paged_kv_cache import SequenceSlice


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of the cache and of a pass."""

    num_blocks: int
    block_size: int = 32
    token_budget: int = 256
    """Most tokens of a forward pass."""
    max_running: int = 32
    """Most sequences that are generated at a time."""
    share_prefixes: bool = True
    """Reuse the cache of equal prefixes."""
    rope_length: int | None = None
    """Length that fixes one RoPE base for all requests; None: each prompt's own length."""


@dataclass(frozen=True)
class GeneratedToken:
    """A token of a request after a step, and the reason if the request has ended."""

    request: Request
    choice: TokenChoice
    reason: str | None
    """None, "stop", "length", or "error" if the model's output is NaN."""


class PagedEngine:
    """Requests, their scheduler and the paged cache of a model. Collective: same calls on every rank."""

    def __init__(self, model: LanguageModel, settings: EngineSettings) -> None:
        self.model, self.settings = model, settings
        self.pool = BlockPool(settings.num_blocks, settings.block_size)
        self.scheduler = Scheduler(
            self.pool, settings.token_budget, settings.max_running, settings.share_prefixes
        )
        self.requests: dict[int, Request] = {}
        self.steps = 0
        self.cache = model.allocate_paged_cache(settings.num_blocks, settings.block_size)
        self._frequencies: dict[int, Tensor] = {}

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and output of one request."""
        return self.settings.num_blocks * self.settings.block_size

    def apply(self, events: Events) -> None:
        """Adds and removes requests between two steps."""
        for submission in events.submissions:
            self._add(submission)
        for number in events.cancellations:
            if request := self.requests.pop(number, None):
                self.scheduler.remove(request)

    def _add(self, submission: Submission) -> None:
        request = Request(
            submission.id, list(submission.prompt), submission.params, follows=submission.follows
        )
        request.rope_length = self._rope_length(len(request.prompt))
        # One tensor per base, so that the cache sees at once that rows share it.
        if request.rope_length not in self._frequencies:
            self._frequencies = {0: self.cache.rope.inverse_frequencies(0)} | {
                active.rope_length: active.frequencies
                for active in self.requests.values()
                if active.frequencies is not None
            }
            length = request.rope_length
            self._frequencies[length] = self.cache.rope.inverse_frequencies(length)
        request.frequencies = self._frequencies[request.rope_length]
        self.requests[request.id] = request
        self.scheduler.add(request)

    def _rope_length(self, prompt_length: int) -> int:
        """Returns the length that fixes a request's RoPE base, 0 for the model's own.

        Dynamic NTK has a base for every length beyond the trained one. It is fixed at admission by the length
        of the prompt and stays, also when the request is preempted: keys in the cache are rotated.
        """
        config = self.model.config
        length = self.settings.rope_length or prompt_length
        is_scaled = config.rope_scaling_type == "dynamic" and length > config.max_position_embeddings
        return length if is_scaled else 0

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken]:
        """Runs one forward pass; returns the tokens that it produced."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        hidden = self._forward(plan)
        self.steps += 1
        ending = [item for item in plan if item.needs_token]
        last = _last_tokens(plan)
        self.scheduler.complete_pass(plan)
        if not ending:
            return []
        requests = [item.request for item in ending]
        return self._finish_step(requests, self._choose(hidden, last, requests))

    def _forward(self, plan: Sequence[ScheduledTokens]) -> Tensor | None:
        """Runs the tokens of a plan; returns hidden states [tokens, h] on the last stage."""
        slices, tokens = [], []
        for item in plan:
            request, first = item.request, item.request.cached
            slices.append(SequenceSlice(request.blocks, first, item.count, request.frequencies))
            if item.count == 1 and request.output and item.needs_token:
                tokens.append(request.output[-1])
            else:
                tokens += request.tokens[first : first + item.count]
        self.cache.begin_pass(slices)
        return self.model.forward_paged(torch.tensor(tokens, device=self.model.device.torch))

    def _choose(
        self, hidden: Tensor | None, last: Sequence[int], requests: Sequence[Request]
    ) -> list[TokenChoice]:
        """Returns the next token of each request, on every rank."""
        packed = None
        if self.model.is_last_stage:
            logits = self.model.logits(hidden[list(last)])
            if self.model.is_sampling_rank:
                packed = batch_sampler.choose_tokens(logits, requests)
        shape = (len(requests), batch_sampler.packed_width(requests))
        return batch_sampler.unpack(self.model.broadcast(packed, shape), requests)

    def _finish_step(
        self, requests: Sequence[Request], choices: Sequence[TokenChoice]
    ) -> list[GeneratedToken]:
        results = []
        for request, choice in zip(requests, choices, strict=True):
            reason = "error" if choice.token == batch_sampler.INVALID else request.append(choice.token)
            if reason:
                self.scheduler.remove(request)
                del self.requests[request.id]
            results.append(GeneratedToken(request, choice, reason))
        return results


def _last_tokens(plan: Sequence[ScheduledTokens]) -> list[int]:
    """Returns the index in the pass of the last token of every request that needs its next one."""
    indices, end = [], 0
    for item in plan:
        end += item.count
        if item.needs_token:
            indices.append(end - 1)
    return indices
