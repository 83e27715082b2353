"""Beam search by the rules of Hugging Face's `generate` (early_stopping=False).

Every step proposes twice as many continuations as there are beams (more with several stop tokens). Among the
best `num_beams`, those that end are finished; the best others continue. A prompt is done when no active beam,
at its present length, has a better score than the worst finished one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from numpy.random import Generator
from torch import Tensor

from ascendspeed.inference.engine.language_model import LanguageModel
from ascendspeed.inference.engine.logits_processors import (
    apply_repetition_penalty,
    random_stream,
    sample_without_replacement,
    warp_logits,
)
from ascendspeed.inference.engine.sampling_params import Completion, SamplingParams

UNUSED_BEAM_SCORE = -1e9
"""Initial score of all beams of a prompt but the first: they are equal, and only one may be continued."""
Candidate = tuple[float, int, int]
"""(sum of log-probabilities, beam, token)."""


@dataclass
class Beam:
    """An active continuation."""

    score: float
    """Sum of log-probabilities."""
    tokens: list[int] = field(default_factory=list)
    row: int = 0
    """Row of the cache."""


@dataclass
class PromptBeams:
    """Active beams and finished completions of one prompt."""

    index: int
    """Index of the prompt."""
    length: int
    """Tokens of the prompt."""
    random: Generator
    """Random stream of the prompt."""
    beams: list[Beam]
    finished: list[Completion] = field(default_factory=list)

    def advance(self, candidates: list[Candidate], params: SamplingParams) -> bool:
        """Continues the beams with candidates, best first; returns whether the prompt is done."""
        size = len(self.beams[0].tokens) + 1
        at_end = size == params.max_new_tokens
        active: list[Beam] = []
        for rank, (score, parent, token) in enumerate(candidates):
            beam, stops = self.beams[parent], token in params.stop_ids
            if stops or at_end:
                if rank < params.num_beams and score > UNUSED_BEAM_SCORE / 2:
                    tokens = beam.tokens if stops else [*beam.tokens, token]
                    reason = "stop" if stops else "length"
                    self.finished.append(Completion(tokens, reason, score / size**params.length_penalty))
            elif len(active) < params.num_beams:
                active.append(Beam(score, [*beam.tokens, token], beam.row))
        self.finished.sort(key=lambda completion: -completion.score)  # stable: the first of equal scores
        del self.finished[params.num_beams :]
        if at_end or not active:
            return True
        self.beams = active
        is_full = len(self.finished) == params.num_beams
        return is_full and active[0].score / size**params.length_penalty <= self.finished[-1].score


def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    order: list[int],
    params: SamplingParams,
    prompt_numbers: Sequence[int],
) -> list[list[Completion]]:
    """Returns the best `num_return_sequences` continuations of every prompt.

    `order`: indices of the prompts, longest first; `prompt_numbers`: see `sample`.
    """
    num_beams = params.num_beams
    lengths = [len(prompts[i]) for i in order]
    cache = model.allocate_cache(len(prompts) * num_beams, lengths[0] + params.max_new_tokens, lengths)
    last_hidden = model.prefill([prompts[i] for i in order])
    hidden = torch.cat(last_hidden).repeat_interleave(num_beams, 0) if model.is_last_stage else None
    cache.reorder([i // num_beams for i in range(len(prompts) * num_beams)], lengths[0])
    searches = _initial_beams(prompts, order, params, prompt_numbers)
    completions: dict[int, list[Completion]] = {}
    for size in range(1, params.max_new_tokens + 1):
        proposals = _propose(model, hidden, prompts, searches, params)
        for search, candidates in zip(searches, proposals, strict=True):
            if search.advance(candidates, params):
                completions[search.index] = search.finished[: params.num_return_sequences]
        searches = [search for search in searches if search.index not in completions]
        if not searches:
            break
        beams = [beam for search in searches for beam in search.beams]
        cache.reorder([beam.row for beam in beams], max(search.length for search in searches) + size - 1)
        for row, beam in enumerate(beams):
            beam.row = row
        tokens = torch.tensor([beam.tokens[-1] for beam in beams], device=model.device.torch)
        slots = [search.length + size - 1 for search in searches for _ in search.beams]
        hidden = model.decode_step(tokens, slots)
    return [completions[i] for i in range(len(prompts))]


def _initial_beams(
    prompts: Sequence[Sequence[int]],
    order: list[int],
    params: SamplingParams,
    prompt_numbers: Sequence[int],
) -> list[PromptBeams]:
    searches = []
    for position, i in enumerate(order):
        beams = []
        for j in range(params.num_beams):
            score = 0.0 if j == 0 else UNUSED_BEAM_SCORE
            beams.append(Beam(score, row=position * params.num_beams + j))
        random = random_stream(params.seed, prompt_numbers[i])
        searches.append(PromptBeams(i, len(prompts[i]), random, beams))
    return searches


def _propose(
    model: LanguageModel,
    hidden: Tensor | None,
    prompts: Sequence[Sequence[int]],
    searches: list[PromptBeams],
    params: SamplingParams,
) -> list[list[Candidate]]:
    """Returns for each prompt the candidates to continue its beams, best first, on every rank."""
    vocab_size = model.config.vocab_size
    count = min(max(2, 1 + len(params.stop_ids)), vocab_size) * params.num_beams
    packed = None
    if model.is_last_stage:
        logprobs = model.logits(hidden).log_softmax(-1)
        if model.is_sampling_rank:
            packed = _best_candidates(logprobs, prompts, searches, params, count)
    packed = model.broadcast(packed, (2, len(searches), count))
    proposals = []
    for scores, indices in packed.transpose(0, 1).tolist():
        beams_and_tokens = [divmod(int(index), vocab_size) for index in indices]
        proposals.append(
            [(score, beam, token) for score, (beam, token) in zip(scores, beams_and_tokens, strict=True)]
        )
    return proposals


def _best_candidates(
    logprobs: Tensor,
    prompts: Sequence[Sequence[int]],
    searches: list[PromptBeams],
    params: SamplingParams,
    count: int,
) -> Tensor:
    """logprobs [rows, V] -> [2, prompts, count]: sums of log-probabilities, and beam * V + token."""
    scores = apply_repetition_penalty(
        logprobs, _seen_tokens(logprobs, prompts, searches, params), params.repetition_penalty
    )
    if params.vocab_size is not None:
        scores[:, params.vocab_size :] = float("-inf")
    if params.is_random:
        scores = warp_logits(scores, params)
    beam_scores = torch.tensor(
        [[beam.score for beam in search.beams] for search in searches],
        device=scores.device,
        dtype=scores.dtype,
    )
    totals = (scores.view(len(searches), params.num_beams, -1) + beam_scores[:, :, None]).flatten(1)
    if params.is_random:
        uniforms = torch.stack([torch.from_numpy(s.random.random(totals.size(1))) for s in searches])
        best, indices = sample_without_replacement(totals, uniforms.to(totals.device), count)
    else:
        best, indices = totals.topk(count)
    return torch.stack((best.double(), indices.double()))


def _seen_tokens(
    logprobs: Tensor,
    prompts: Sequence[Sequence[int]],
    searches: list[PromptBeams],
    params: SamplingParams,
) -> Tensor | None:
    """Returns which tokens each beam contains, prompt included: [rows, V] bool; None without a repetition
    penalty."""
    if params.repetition_penalty == 1:
        return None
    seen = torch.zeros_like(logprobs, dtype=torch.bool)
    texts = [[*prompts[search.index], *beam.tokens] for search in searches for beam in search.beams]
    for row, text in zip(seen, texts, strict=True):
        row[torch.tensor(text, device=row.device)] = True
    return seen
