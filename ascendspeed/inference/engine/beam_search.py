"""Beam search: of each prompt the best few continuations, by the rules of Hugging Face's `generate` (early_stopping=False).

Every step offers twice as many continuations as there are beams (more with several stop tokens). Of the best `num_beams` those that
end are finished; the best others go on. A prompt is done when none of the beams under way, at its present length, beats the worst
finished one.
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


@dataclass
class Beam:
    """A continuation under way."""

    score: float
    """Sum of log-probabilities."""
    tokens: list[int] = field(default_factory=list)
    row: int = 0
    """In the cache."""


@dataclass
class PromptBeams:
    """One prompt."""

    number: int
    length: int
    """Of the prompt."""
    draws: Generator
    """Its own stream."""
    beams: list[Beam]
    finished: list[Completion] = field(default_factory=list)

    def advance(self, offered: list[tuple[float, int, int]], params: SamplingParams) -> bool:
        """Takes the offered (score, beam, token), best first; whether the prompt is done."""
        beams = params.num_beams
        size = len(self.beams[0].tokens) + 1
        at_end = size == params.max_new_tokens
        going: list[Beam] = []
        for rank, (score, parent, token) in enumerate(offered):
            old, stops = self.beams[parent], token in params.stop_ids
            if stops or at_end:
                if rank < beams and score > UNUSED_BEAM_SCORE / 2:
                    tokens = old.tokens if stops else [*old.tokens, token]
                    self.finished.append(
                        Completion(tokens, "stop" if stops else "length", score / size**params.length_penalty)
                    )
            elif len(going) < beams:
                going.append(Beam(score, [*old.tokens, token], old.row))
        self.finished = sorted(self.finished, key=lambda one: -one.score)[
            :beams
        ]  # stable: of equal ones the first
        if at_end or not going:
            return True
        self.beams = going
        full = len(self.finished) == beams
        return full and going[0].score / size**params.length_penalty <= self.finished[-1].score


def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    order: list[int],
    params: SamplingParams,
    numbers: Sequence[int],
) -> list[list[Completion]]:
    """The best `num_return_sequences` continuations of every prompt; `order`: the longest first; `numbers`: see `sample`."""
    beams, lengths = params.num_beams, [len(prompts[i]) for i in order]
    cache = model.allocate_cache(len(prompts) * beams, lengths[0] + params.max_new_tokens, lengths)
    last = model.prefill([prompts[i] for i in order])
    hidden = torch.cat(last).repeat_interleave(beams, 0) if model.is_last_stage else None
    cache.reorder([i // beams for i in range(len(prompts) * beams)], lengths[0])
    # The beams of a prompt begin equal: only the first counts.
    live = [
        PromptBeams(
            i,
            len(prompts[i]),
            random_stream(params.seed, numbers[i]),
            [Beam(0.0 if not j else UNUSED_BEAM_SCORE) for j in range(beams)],
        )
        for i in order
    ]
    for at, one in enumerate(live):
        for j, beam in enumerate(one.beams):
            beam.row = at * beams + j
    done: dict[int, list[Completion]] = {}
    for size in range(1, params.max_new_tokens + 1):
        offers = _offers(model, hidden, prompts, live, params)
        for one, offered in zip(live, offers, strict=True):
            if one.advance(offered, params):
                done[one.number] = one.finished[: params.num_return_sequences]
        live = [one for one in live if one.number not in done]
        if not live:
            break
        rows = [beam for one in live for beam in one.beams]
        cache.reorder([beam.row for beam in rows], max(one.length for one in live) + size - 1)
        for at, beam in enumerate(rows):
            beam.row = at
        tokens = torch.tensor([beam.tokens[-1] for beam in rows], device=model.device.torch)
        hidden = model.decode_step(tokens, [one.length + size - 1 for one in live for _ in one.beams])
    return [done[i] for i in range(len(prompts))]


def _offers(
    model: LanguageModel,
    hidden: Tensor | None,
    prompts: Sequence[Sequence[int]],
    live: list[PromptBeams],
    params: SamplingParams,
) -> list[list[tuple[float, int, int]]]:
    """For each prompt the (score, beam, token) that its beams may go on with, best first."""
    count = min(max(2, 1 + len(params.stop_ids)), model.config.vocab_size) * params.num_beams
    packed = None
    if model.is_last_stage:
        scores = model.logits(hidden).log_softmax(-1)
        if model.is_sampling_rank:
            packed = _best(scores, prompts, live, params, count)
    packed = model.broadcast(packed, (2, len(live), count))
    vocabulary = model.config.vocab_size
    return [
        [
            (score, int(index) // vocabulary, int(index) % vocabulary)
            for score, index in zip(*pair, strict=True)
        ]
        for pair in packed.transpose(0, 1).tolist()
    ]


def _best(
    scores: Tensor,
    prompts: Sequence[Sequence[int]],
    live: list[PromptBeams],
    params: SamplingParams,
    count: int,
) -> Tensor:
    """scores [rows, V] -> [2, prompts, count]: sums of log-probabilities and beam * V + token."""
    seen = None
    if params.repetition_penalty != 1:
        seen = torch.zeros_like(scores, dtype=torch.bool)
        texts = [[*prompts[one.number], *beam.tokens] for one in live for beam in one.beams]
        for row, text in zip(seen, texts, strict=True):
            row[torch.tensor(text, device=row.device)] = True
    scores = apply_repetition_penalty(scores, seen, params.repetition_penalty)
    if params.vocab_size is not None:
        scores[:, params.vocab_size :] = float("-inf")
    if params.do_sample:
        scores = warp_logits(scores, params)
    sums = torch.tensor(
        [[beam.score for beam in one.beams] for one in live], device=scores.device, dtype=scores.dtype
    )
    offered = (scores.view(len(live), params.num_beams, -1) + sums[:, :, None]).flatten(1)
    if params.do_sample:
        noise = torch.stack([torch.from_numpy(one.draws.random(offered.size(1))) for one in live]).to(
            offered.device
        )
        best, at = sample_without_replacement(offered, noise, count)
    else:
        best, at = offered.topk(count)
    return torch.stack((best.double(), at.double()))
