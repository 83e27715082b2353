"""Log-likelihoods: of every token of a text, or of a continuation of a context, with common prefixes computed
once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.inference.engine.language_model import LanguageModel

Tokens = Sequence[int]
ScoreRequest = tuple[Tokens, Tokens]
"""(context, continuation)."""

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


@dataclass(frozen=True)
class ScoringRow:
    """An input of the model that answers one or more requests."""

    tokens: tuple[int, ...]
    first_position: int
    """First position whose prediction is needed."""
    requests: list[int]
    """Indices of the requests."""


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that begin with the same tokens."""

    prefix_length: int
    rows: list[ScoringRow]


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
    batch_size: int = 16,
    on_score: Callable[[int, ContinuationScore], None] | None = None,
) -> list[ContinuationScore]:
    """Returns the scores of (context, continuation) pairs, neither of them empty. Collective.

    Requests with the same input (a question and its one-token answers) share a row; rows with a common prefix
    (few-shot examples before the questions) share its computation. `on_score(index, score)` is called as
    scores become available.
    """
    assert all(context and continuation for context, continuation in requests), (
        "neither context nor continuation may be empty"
    )
    scores: dict[int, ContinuationScore] = {}
    with torch.inference_mode(), _freeing_cache(model):
        for group in group_by_prefix(unique_rows(requests), model.config):
            for batch in _prepare_batches(model, group, batch_size):
                for i, score in _score_batch(model, requests, group, batch):
                    scores[i] = score
                    if on_score:
                        on_score(i, score)
    return [scores[i] for i in range(len(requests))]


def unique_rows(requests: Sequence[ScoreRequest]) -> list[ScoringRow]:
    """Returns the different inputs of the requests, sorted by their tokens."""
    by_tokens: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        by_tokens.setdefault((*context, *continuation[:-1]), []).append(i)
    rows = []
    for tokens, indices in sorted(by_tokens.items()):
        first_position = min(len(requests[i][0]) for i in indices) - 1
        rows.append(ScoringRow(tokens, first_position, indices))
    return rows


def group_by_prefix(rows: Sequence[ScoringRow], config: ModelConfig) -> list[PrefixGroup]:
    """Splits sorted rows into groups with a common prefix, if that saves more tokens than a shorter prefix
    costs.

    Positions that are scored are not part of a prefix. Rows beyond the trained length with dynamic RoPE
    scaling have a base of their own and share nothing.
    """
    limit = config.max_position_embeddings if config.rope_scaling_type == "dynamic" else math.inf
    groups: list[PrefixGroup] = []
    for row in rows:
        if len(row.tokens) > limit:
            continue
        if groups:
            group = groups[-1]
            prefix = group.rows[0].tokens[: group.prefix_length]
            common = min(_common_length(prefix, row.tokens), row.first_position)
            if (group.prefix_length - common) * len(group.rows) < common:
                groups[-1] = PrefixGroup(common, [*group.rows, row])
                continue
        groups.append(PrefixGroup(row.first_position, [row]))
    shared = [group for group in groups if len(group.rows) > 1]
    single = [group.rows[0] for group in groups if len(group.rows) == 1]
    too_long = [row for row in rows if len(row.tokens) > limit]
    return shared + [PrefixGroup(0, unshared) for unshared in (single, too_long) if unshared]


def _common_length(a: Tokens, b: Tokens) -> int:
    """Returns the length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def split(items: Sequence, size: int) -> Iterator[Sequence]:
    """Yields slices of `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))


def _prepare_batches(
    model: LanguageModel, group: PrefixGroup, batch_size: int
) -> Iterator[Sequence[ScoringRow]]:
    """Yields the group's rows in batches, longest first, with the prefix in the cache of every row."""
    rows = sorted(group.rows, key=lambda row: -len(row.tokens))
    count = min(batch_size, len(rows))
    if group.prefix_length:
        cache = model.allocate_cache(count, len(rows[0].tokens), [0])
        model.prefill([rows[0].tokens[: group.prefix_length]], positions=[[]])
        cache.reorder([0] * count, group.prefix_length)
    for batch in split(rows, batch_size):
        if not group.prefix_length:
            lengths = [len(row.tokens) for row in batch]
            model.allocate_cache(len(batch), lengths[0], lengths)
        yield batch


def _score_batch(
    model: LanguageModel,
    requests: Sequence[ScoreRequest],
    group: PrefixGroup,
    batch: Sequence[ScoringRow],
) -> Iterator[tuple[int, ContinuationScore]]:
    """Yields (index of the request, score) for every request of the rows."""
    prefix = group.prefix_length
    positions = [range(row.first_position - prefix, len(row.tokens) - prefix) for row in batch]
    hidden = model.prefill([row.tokens[prefix:] for row in batch], prefix, positions)
    states: list[int] = []
    targets: list[int] = []
    indices: list[int] = []
    row_offset = 0  # index of the row's first hidden state among those of the batch
    for row, row_positions in zip(batch, positions, strict=True):
        for i in row.requests:
            context, continuation = requests[i]
            first = row_offset + len(context) - 1 - row.first_position
            states += range(first, first + len(continuation))
            targets += continuation
            indices.append(i)
        row_offset += len(row_positions)
    sizes = [len(requests[i][1]) for i in indices]
    logprobs, is_best = _logprobs_of(model, hidden, states, targets)
    for i, values, best in zip(indices, logprobs.split(sizes), is_best.split(sizes), strict=True):
        yield i, ContinuationScore(float(values.sum()), bool(best.all()), len(values))


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
