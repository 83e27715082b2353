"""Log-likelihoods: of every token of a text, or of a continuation of a context, with common prefixes computed
once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.inference.engine.language_model import PREFILL_CHUNK, LanguageModel
from ascendspeed.inference.engine.prefix_tree import PrefixTree, passes
from ascendspeed.models.gpt.tree_kv_cache import Segment

Tokens = Sequence[int]
ScoreRequest = tuple[Tokens, Tokens]
"""(context, continuation)."""

TOKEN_BUDGET = PREFILL_CHUNK
"""Most tokens of a forward pass of `score_continuations`."""
MAX_LOGITS = 1 << 26
"""Maximum number of logits in memory at a time."""


@dataclass(frozen=True)
class ContinuationScore:
    """Log-likelihood of a continuation."""

    logprob: float
    """Sum of the log-probabilities of its tokens."""
    is_greedy: bool
    """True if each of its tokens is the most likely one."""
    token_count: int


def token_logprobs(model: LanguageModel, tokens: Sequence[Tokens], batch_size: int = 16) -> list[Tensor]:
    """Returns for each sequence the log-probability of every token given those before it: [n - 1], fp32, on
    the CPU.

    Collective.
    """
    logprobs = [torch.empty(0)] * len(tokens)
    order = sorted((i for i in range(len(tokens)) if len(tokens[i]) > 1), key=lambda i: -len(tokens[i]))
    with torch.inference_mode(), _freeing_cache(model):
        for batch in split(order, batch_size):
            rows = [tokens[i][:-1] for i in batch]
            lengths = [len(row) for row in rows]
            model.allocate_cache(len(rows), lengths[0], lengths)
            hidden = model.prefill(rows, positions=[range(length) for length in lengths])
            targets = [token for i in batch for token in tokens[i][1:]]
            values, _ = _logprobs_of(model, hidden, range(sum(lengths)), targets)
            for i, part in zip(batch, values.split(lengths), strict=True):
                logprobs[i] = part.float()
    return logprobs


@contextmanager
def _freeing_cache(model: LanguageModel) -> Iterator[None]:
    """Frees the cache at the end, also after an exception."""
    try:
        yield
    finally:
        model.free_cache()


def score_continuations(
    model: LanguageModel,
    requests: Sequence[ScoreRequest],
    token_budget: int = TOKEN_BUDGET,
    on_score: Callable[[int, ContinuationScore], None] | None = None,
) -> list[ContinuationScore]:
    """Returns the scores of (context, continuation) pairs, neither of them empty. Collective.

    Tokens that several requests have in common (the examples before the questions of a subject, a question
    before its answers) pass through the model once, at most `token_budget` in a pass.
    `on_score(index, score)` is called as scores become available.
    """
    assert all(context and continuation for context, continuation in requests), (
        "neither context nor continuation may be empty"
    )
    scores: dict[int, ContinuationScore] = {}
    with torch.inference_mode(), _freeing_cache(model):
        for rope_length, members in _by_rope_length(requests, model.config).items():
            model.begin_tree(rope_length)
            tree = ScoringTree(requests, members, token_budget)
            for segments in passes(tree.segments, token_budget):
                hidden = model.forward_tree(segments)
                for i, score in _score_pass(model, hidden, tree, segments):
                    scores[i] = score
                    if on_score:
                        on_score(i, score)
    return [scores[i] for i in range(len(requests))]


def _by_rope_length(requests: Sequence[ScoreRequest], config: ModelConfig) -> dict[int, list[int]]:
    """Returns the indices of the requests by the length that fixes their RoPE base, 0 for the model's own.

    With dynamic RoPE scaling an input beyond the trained length has the base of its own length.
    """
    limit = config.max_position_embeddings if config.rope_scaling_type == "dynamic" else math.inf
    groups: dict[int, list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        length = len(context) + len(continuation) - 1
        groups.setdefault(length if length > limit else 0, []).append(i)
    return groups


class ScoringTree:
    """Tree of the inputs of requests, with the tokens whose log-probabilities they need."""

    def __init__(self, requests: Sequence[ScoreRequest], members: Sequence[int], max_segment: int) -> None:
        """`members`: indices of the requests; `max_segment`: most tokens of a segment."""
        self.targets: dict[Segment, list[tuple[int, int, int]]] = {}
        """Segment -> (index of a token, request, index in its continuation of the token to predict)."""
        self.requests = requests
        self._logprobs = {i: [0.0] * len(requests[i][1]) for i in members}
        self._missing = {i: len(requests[i][1]) for i in members}
        self._not_greedy: set[int] = set()
        rows: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            context, continuation = requests[i]
            rows.setdefault((*context, *continuation[:-1]), []).append(i)
        tree = PrefixTree(sorted(rows), max_segment)
        self.segments = tree.segments
        for number, row in enumerate(sorted(rows)):
            for i in rows[row]:
                context, continuation = requests[i]
                for k in range(len(continuation)):
                    segment, token = tree.locate(number, len(context) - 1 + k)
                    self.targets.setdefault(segment, []).append((token, i, k))
        for segment, targets in self.targets.items():
            segment.scored = sorted({token for token, _, _ in targets})

    def record(self, request: int, index: int, logprob: float, is_best: bool) -> ContinuationScore | None:
        """Stores the log-probability of a token of a continuation; returns the score once all are known."""
        logprobs = self._logprobs[request]
        logprobs[index] = logprob
        if not is_best:
            self._not_greedy.add(request)
        self._missing[request] -= 1
        if self._missing[request]:
            return None
        return ContinuationScore(sum(logprobs), request not in self._not_greedy, len(logprobs))


def _score_pass(
    model: LanguageModel, hidden: Tensor | None, tree: ScoringTree, segments: Sequence[Segment]
) -> Iterator[tuple[int, ContinuationScore]]:
    """Yields (index, score) of the requests that are complete after a pass; `hidden` [n, h] of its scored
    tokens."""
    states: list[int] = []
    places: list[tuple[int, int]] = []
    first = 0  # index of the segment's first hidden state among those of the pass
    for segment in segments:
        state_of = {token: first + i for i, token in enumerate(segment.scored)}
        for token, request, index in tree.targets.get(segment, ()):
            states.append(state_of[token])
            places.append((request, index))
        first += len(segment.scored)
    if not places:
        return
    targets = [tree.requests[request][1][index] for request, index in places]
    logprobs, is_best = _logprobs_of(model, [hidden], states, targets).tolist()
    for (request, index), logprob, best in zip(places, logprobs, is_best, strict=True):
        if score := tree.record(request, index, logprob, bool(best)):
            yield request, score


def split(items: Sequence, size: int) -> Iterator[Sequence]:
    """Yields slices of `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))


def _logprobs_of(
    model: LanguageModel, hidden: list[Tensor], states: Sequence[int], targets: Sequence[int]
) -> Tensor:
    """Returns [2, n] on every rank: log-probability of targets[i] at hidden state states[i], and whether it
    is the most likely."""
    result = None
    if model.is_last_stage:
        all_hidden = torch.cat(hidden)
        device = all_hidden.device
        chunk = max(1, MAX_LOGITS // model.config.vocab_size)
        state_index = torch.tensor(list(states), device=device)
        target = torch.tensor(list(targets), device=device)
        result = torch.empty(2, len(targets), dtype=torch.float64, device=device)
        for start in range(0, len(all_hidden), chunk):
            in_chunk = (state_index >= start) & (state_index < start + chunk)
            logits = model.logits(all_hidden[start : start + chunk])
            rows = state_index[in_chunk] - start
            values = logits[rows, target[in_chunk]]
            result[0, in_chunk] = (values - logits.logsumexp(-1)[rows]).double()
            result[1, in_chunk] = (values == logits.amax(-1)[rows]).double()
    return model.broadcast(result, (2, len(targets))).cpu()
