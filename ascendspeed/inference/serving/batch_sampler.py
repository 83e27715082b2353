"""Chooses the next token of every row of a batch whose requests have their own sampling parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ascendspeed.inference.engine.logits_processors import (
    apply_repetition_penalty,
    sample_from_logits,
    warp_logits,
)
from ascendspeed.inference.serving.request import Request, TokenChoice

INVALID = -1
"""Token of a row whose logits are NaN."""


def choose_tokens(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Returns per row of logits [n, V] the token, its log-probability, and the `top_logprobs` most likely
    tokens and their log-probabilities: fp64 [n, 2 + 2K] with K of `packed_width`.

    A row depends on nothing but its own logits, parameters and random stream.
    """
    invalid = logits.isnan().any(-1)
    logits = logits.masked_fill(invalid[:, None], 0.0)
    return _pack(logits, _choose(logits, requests), invalid, requests)


def score_tokens(logits: Tensor, tokens: Sequence[int], requests: Sequence[Request]) -> Tensor:
    """Returns what `choose_tokens` does, for given tokens, one per row."""
    invalid = logits.isnan().any(-1)
    logits = logits.masked_fill(invalid[:, None], 0.0)
    return _pack(logits, torch.tensor(tokens, device=logits.device), invalid, requests)


def _pack(logits: Tensor, tokens: Tensor, invalid: Tensor, requests: Sequence[Request]) -> Tensor:
    top = max(request.params.top_logprobs for request in requests)
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(1, tokens[:, None])[:, 0] - normalizer
    columns = [tokens.masked_fill(invalid, INVALID).double()[:, None], chosen.double()[:, None]]
    if top:
        usable = requests[0].params.sampling.vocab_size or logits.size(-1)  # the same for all requests
        best, ids = logits[:, :usable].topk(top)
        columns += [ids.double(), (best - normalizer[:, None]).double()]
    return torch.cat(columns, 1)


def packed_width(requests: Sequence[Request]) -> int:
    """Number of columns of `choose_tokens`."""
    return 2 + 2 * max(request.params.top_logprobs for request in requests)


def unpack(packed: Tensor, requests: Sequence[Request]) -> list[TokenChoice]:
    """Decodes the result of `choose_tokens`."""
    choices = []
    most = (packed.size(1) - 2) // 2
    for values, request in zip(packed.tolist(), requests, strict=True):
        count = request.params.top_logprobs
        ids, logprobs = values[2 : 2 + count], values[2 + most : 2 + most + count]
        top = tuple((int(token), logprob) for token, logprob in zip(ids, logprobs, strict=True))
        choices.append(TokenChoice(int(values[0]), values[1], top))
    return choices


def _choose(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Returns the next token [n] of every row."""
    scores = logits
    if any(request.params.changes_scores for request in requests):
        scores = torch.stack(
            [_penalized(row, request) for row, request in zip(logits, requests, strict=True)]
        )
    limits = [request.params.sampling.vocab_size or logits.size(-1) for request in requests]
    beyond = torch.arange(logits.size(-1)) >= torch.tensor(limits)[:, None]
    scores = scores.masked_fill(beyond.to(scores.device), float("-inf"))
    tokens = scores.argmax(-1)
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, request in enumerate(requests):
        sampling = request.params.sampling
        if sampling.is_random:
            groups.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(row)
    for rows in groups.values():
        uniforms = torch.tensor(
            [requests[row].random.random() for row in rows], dtype=torch.float64, device=logits.device
        )
        warped = warp_logits(scores[rows], requests[rows[0]].params.sampling)
        tokens[rows] = sample_from_logits(warped, uniforms)
    return tokens


def _penalized(logits: Tensor, request: Request) -> Tensor:
    """Returns the scores of one row of logits [V] under the request's penalties and biases."""
    params, sampling = request.params, request.params.sampling
    scores = logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(scores, dtype=torch.bool)
        seen[torch.tensor(request.tokens, device=seen.device)] = True
        scores = apply_repetition_penalty(scores, seen, sampling.repetition_penalty)
    if request.counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(request.counts), device=scores.device)
        counts = torch.tensor(list(request.counts.values()), dtype=scores.dtype, device=scores.device)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias:
        scores[token] += bias
    if len(request.output) < params.min_new_tokens:
        scores[[token for token in sampling.stop_ids if token < len(scores)]] = float("-inf")
    return scores
