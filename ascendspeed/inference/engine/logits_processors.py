"""From logits to tokens: the rules of Hugging Face's processors, in their order."""

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor

from ascendspeed.inference.engine.sampling_params import SamplingParams


def random_stream(seed: int, number: int) -> Generator:
    """Random numbers of each (seed, number) alone."""
    return Generator(Philox(key=np.array([seed & (2**64 - 1), number], dtype=np.uint64)))


def apply_repetition_penalty(scores: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """scores [n, V] of tokens that were there (`seen`, bool): divided by the penalty, or multiplied where negative. A copy."""
    if seen is None:
        return scores.clone()
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp_logits(scores: Tensor, params: SamplingParams) -> Tensor:
    """scores [n, V] after temperature, top-k and top-p: what is not to be drawn is -inf."""
    scores = scores / params.temperature
    if 0 < params.top_k < scores.size(-1):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[:, -1:], float("-inf"))
    if params.top_p < 1:
        rising, order = scores.sort(-1)
        out = rising.softmax(-1).cumsum(-1) <= 1 - params.top_p
        out[:, -1] = False  # the most likely one stays
        scores = scores.masked_fill(out.scatter(1, order, out), float("-inf"))
    return scores


def sample_from_logits(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Of each row the first id at which the sum of softmax(scores [n, V]) passes `uniforms` [n] in [0, 1): [n]."""
    sums = scores.double().softmax(-1).cumsum(-1)
    wanted = (uniforms.clamp(max=1 - 1e-12) * sums[:, -1])[:, None]  # never past the last id that has any
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp_(
        max=scores.size(-1) - 1
    )  # where scores are NaN


def sample_without_replacement(scores: Tensor, uniforms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` different ids of each row by softmax(scores [n, V]), the first drawn first: their scores and themselves, [n, count].

    By exponential races (Efraimidis and Spirakis 2006): the ids with the largest log(p) - log(-log(u)).
    """
    races = scores.double() - (-uniforms.clamp(1e-300, 1 - 1e-16).log()).log()
    at = races.topk(count).indices
    return scores.gather(1, at), at
