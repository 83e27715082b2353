"""Logits processors and sampling by the rules of Hugging Face's `generate`, in the same order."""

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor

from ascendspeed.inference.engine.sampling_params import SamplingParams


def random_stream(seed: int, number: int) -> Generator:
    """Returns a generator that depends on (seed, number) only."""
    return Generator(Philox(key=np.array([seed & (2**64 - 1), number], dtype=np.uint64)))


def apply_repetition_penalty(scores: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Returns a copy of scores [n, V] in which those of seen tokens (bool [n, V]) are penalized.

    Positive scores are divided by the penalty, negative ones multiplied.
    """
    if seen is None:
        return scores.clone()
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp_logits(scores: Tensor, params: SamplingParams) -> Tensor:
    """Applies temperature, top-k and top-p to scores [n, V]; excluded tokens become -inf."""
    scores = scores / params.temperature
    if 0 < params.top_k < scores.size(-1):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[:, -1:], float("-inf"))
    if params.top_p < 1:
        ascending, order = scores.sort(-1)
        excluded = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        excluded[:, -1] = False  # the most likely token stays
        scores = scores.masked_fill(excluded.scatter(1, order, excluded), float("-inf"))
    return scores


def sample_from_logits(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Returns one id per row [n], drawn from softmax(scores [n, V]) by inverse transform of `uniforms` [n] in
    [0, 1)."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    # Clamped below the total, so that no id of probability 0 at the end is drawn.
    target = (uniforms.clamp(max=1 - 1e-12) * cumulative[:, -1])[:, None]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return ids.clamp_(max=scores.size(-1) - 1)  # out of range if scores are NaN


def sample_without_replacement(scores: Tensor, uniforms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draws `count` different ids per row from softmax(scores [n, V]); returns their scores and the ids, [n,
    count].

    The first id was drawn first. Exponential races (Efraimidis and Spirakis 2006): the ids with the largest
    log(p) - log(-log(u)), with `uniforms` u [n, V].
    """
    races = scores.double() - (-uniforms.clamp(1e-300, 1 - 1e-16).log()).log()
    ids = races.topk(count).indices
    return scores.gather(1, ids), ids
