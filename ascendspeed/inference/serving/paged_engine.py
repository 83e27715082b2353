"""Engine of continuous batching: one forward pass per step over the tokens that the scheduler chose.

Every rank runs the same engine on the same events; one rank samples and broadcasts the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendspeed.distributed.cuda_graphs import Capture
from ascendspeed.inference.engine.language_model import LanguageModel
from ascendspeed.inference.serving import batch_sampler
from ascendspeed.inference.serving.block_pool import BlockPool
from ascendspeed.inference.serving.decode_graphs import DecodeGraphs
from ascendspeed.inference.serving.request import Events, Request, Submission, TokenChoice
from ascendspeed.inference.serving.scheduler import ScheduledTokens, Scheduler
from ascendspeed.models.gpt.paged_kv_cache import SequenceSlice

SCORED_ROWS = 256
"""Most rows of logits of a prompt that exist at a time: a row has the length of the vocabulary."""


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
    lookup: int = 0
    """Most tokens that prompt lookup proposes at a time for a greedy request; 0: no prompt lookup."""
    max_request_tokens: int | None = None
    """Most tokens of prompt and output of one request; None: as many as the cache holds."""


@dataclass(frozen=True)
class GeneratedToken:
    """A token of a request after a step, and the reason if the request has ended."""

    request: Request
    choice: TokenChoice
    reason: str | None
    """None, "stop", "length", or "error" if the model's output is NaN."""


class PagedEngine:
    """Requests, their scheduler and the paged cache of a model. Collective: same calls on every rank."""

    def __init__(
        self, model: LanguageModel, settings: EngineSettings, capture: Capture | None = None
    ) -> None:
        """`capture`: of `decode_graphs.open_capture`, for graphs of decode passes; None: no graphs."""
        self.model, self.settings = model, settings
        self.pool = BlockPool(settings.num_blocks, settings.block_size)
        self.scheduler = Scheduler(
            self.pool,
            settings.token_budget,
            settings.max_running,
            settings.share_prefixes,
            settings.lookup,
        )
        self.requests: dict[int, Request] = {}
        self.steps = 0
        scratch_blocks = 0 if capture is None else 1
        self.cache = model.allocate_paged_cache(settings.num_blocks + scratch_blocks, settings.block_size)
        self.graphs: DecodeGraphs | None = None
        if capture is not None:
            most = -(-(settings.max_request_tokens or self.max_tokens) // settings.block_size)
            self.graphs = DecodeGraphs(model, settings.max_running, most, settings.num_blocks, capture)
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
        self._score_prompts(hidden, plan)
        ending = [item for item in plan if item.needs_token]
        rows = _rows_to_choose(plan)
        self.scheduler.complete_pass(plan)
        if not ending:
            return []
        requests = [item.request for item in ending for _ in range(1 + len(item.draft))]
        return self._finish_step(ending, self._choose(hidden, rows, requests))

    def _forward(self, plan: Sequence[ScheduledTokens]) -> Tensor | None:
        """Runs the tokens of a plan; returns hidden states [tokens, h] on the last stage."""
        slices, tokens = [], []
        for item in plan:
            request, first = item.request, item.request.cached
            slices.append(SequenceSlice(request.blocks, first, item.size, request.frequencies))
            if item.count == 1 and request.output and item.needs_token:
                tokens.append(request.output[-1])
            else:
                tokens += request.tokens[first : first + item.count]
            tokens += item.draft
        if self.graphs is not None and self.graphs.takes(slices):
            return self.graphs.run(tokens, slices)
        self.cache.begin_pass(slices)
        return self.model.forward_paged(torch.tensor(tokens, device=self.model.device.torch))

    def _score_prompts(self, hidden: Tensor | None, plan: Sequence[ScheduledTokens]) -> None:
        """Appends the log-probabilities of the prompt's tokens that this pass has computed."""
        start = 0
        for item in plan:
            request, first = item.request, item.request.cached
            if request.params.scores_prompt:
                known = max(first, len(request.prompt_choices))
                for part in range(known, min(first + item.count, len(request.prompt) - 1), SCORED_ROWS):
                    end = min(part + SCORED_ROWS, first + item.count, len(request.prompt) - 1)
                    rows = range(start + part - first, start + end - first)
                    tokens = request.prompt[part + 1 : end + 1]
                    request.prompt_choices += self._score(hidden, rows, tokens, request)
            start += item.size

    def _score(
        self, hidden: Tensor | None, rows: Sequence[int], tokens: Sequence[int], request: Request
    ) -> list[TokenChoice]:
        """Returns the log-probabilities of given tokens after rows of the pass, on every rank."""
        packed, requests = None, [request] * len(rows)
        if self.model.is_last_stage:
            logits = self.model.logits(hidden[list(rows)])
            if self.model.is_sampling_rank:
                packed = batch_sampler.score_tokens(logits, tokens, requests)
        shape = (len(rows), batch_sampler.packed_width(requests))
        return batch_sampler.unpack(self.model.broadcast(packed, shape), requests)

    def _choose(
        self, hidden: Tensor | None, rows: Sequence[int], requests: Sequence[Request]
    ) -> list[TokenChoice]:
        """Returns the token after each row of the pass, by the parameters of its request, on every rank."""
        packed = None
        if self.model.is_last_stage:
            logits = self.model.logits(hidden[list(rows)])
            if self.model.is_sampling_rank:
                packed = batch_sampler.choose_tokens(logits, requests)
        shape = (len(requests), batch_sampler.packed_width(requests))
        return batch_sampler.unpack(self.model.broadcast(packed, shape), requests)

    def _finish_step(
        self, ending: Sequence[ScheduledTokens], choices: Sequence[TokenChoice]
    ) -> list[GeneratedToken]:
        """Appends the chosen tokens; those after a draft's first wrong token are dropped."""
        results, start = [], 0
        for item in ending:
            request = item.request
            chosen = choices[start : start + 1 + len(item.draft)]
            start += len(chosen)
            for choice, proposed in zip(chosen, (*item.draft, None), strict=True):
                is_invalid = choice.token == batch_sampler.INVALID
                reason = "error" if is_invalid else request.append(choice.token)
                results.append(GeneratedToken(request, choice, reason))
                if reason:
                    self.scheduler.remove(request)
                    del self.requests[request.id]
                if reason or choice.token != proposed:
                    break
                request.cached += 1  # the keys of the draft's token are in the cache
        return results


def _rows_to_choose(plan: Sequence[ScheduledTokens]) -> list[int]:
    """Returns the indices in the pass of the last token, and of the draft, of every request that needs its
    next one."""
    indices, end = [], 0
    for item in plan:
        end += item.size
        if item.needs_token:
            indices += range(end - 1 - len(item.draft), end)
    return indices
